// T5 of theorems.md: exact is exact, greedy is exact where it should be, exact <= greedy <= uniform always,
// and a larger budget never costs more error. Against brute force on thousands of small instances, against a
// plain dynamic programme on larger ones, and against the bounds of theory/bounds.hpp.
#include "kvplane/allocate/bit_allocation.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "kvplane/theory/bounds.hpp"
#include "test_support.hpp"

namespace {

using kvplane::allocate;
using kvplane::Allocation;
using kvplane::AllocationItem;
using kvplane::AllocationMethod;
using kvplane::AllocationOption;
using kvplane::AllocationSettings;
using kvplane::ErrorCode;
using Items = std::vector<AllocationItem>;

constexpr double infinity = std::numeric_limits<double>::infinity();

class Random {
  public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}
    double real(double low, double high) {
        return std::uniform_real_distribution<double>(low, high)(engine_);
    }
    std::size_t whole(std::size_t low, std::size_t high) {
        return std::uniform_int_distribution<std::size_t>(low, high)(engine_);
    }
    bool chance(double p) { return real(0, 1) < p; }

  private:
    std::mt19937_64 engine_;
};

Allocation exact(const Items& items, double budget) {
    return allocate(items, budget);
}
Allocation greedy(const Items& items, double budget) {
    return allocate(items, budget, {.method = AllocationMethod::greedy});
}
Allocation uniform(const Items& items, double budget) {
    return allocate(items, budget, {.method = AllocationMethod::uniform});
}

/// The least error of all choices that fit, by trying them all.
double brute_force(const Items& items, double budget) {
    std::vector<std::size_t> choice(items.size(), 0);
    double best = infinity;
    for (bool more = true; more;) {
        const Allocation candidate = kvplane::evaluate_allocation(items, choice);
        if (candidate.cost <= budget * (1 + 1e-9)) best = std::min(best, candidate.error);
        more = false;
        for (std::size_t i = 0; i < items.size() && !more; ++i) {
            more = ++choice[i] < items[i].options.size();
            if (!more) choice[i] = 0;
        }
    }
    return best;
}

enum class Curves { convex, noisy, unrelated, flat };
enum class Costs { unit, mixed, real };

/// Menus of every kind: convex, not convex, not monotone, with ties; costs of 0, 1.58, in no order.
AllocationItem random_item(Random& random, Curves curves, Costs costs, std::size_t options) {
    static constexpr double mixed[] = {1, 1.58, 2, 4, 6, 8};
    AllocationItem item{random.chance(0.1) ? 0 : std::exp(random.real(-4, 4)), 1, {}};
    if (random.chance(0.3)) item.count = random.chance(0.1) ? 0 : std::floor(random.real(1, 9));
    for (std::size_t o = 0; o < options; ++o) {
        double cost = static_cast<double>(o);
        if (costs == Costs::mixed) cost = mixed[o % 6] + (o < 6 ? 0.25 : 0.5);
        if (costs == Costs::real) cost = random.real(0, 8);
        double distortion = std::pow(4, -cost);
        if (curves == Curves::noisy) distortion *= random.real(0.3, 3);
        if (curves == Curves::unrelated) distortion = random.real(0, 1);
        if (curves == Curves::flat) distortion = 1 - 0.1 * std::floor(cost / 2);
        item.options.push_back({cost, distortion});
    }
    if (random.chance(0.5)) std::swap(item.options.front(), item.options.back());
    return item;
}

Items random_items(Random& random, std::size_t most_items, std::size_t most_options) {
    const auto curves = static_cast<Curves>(random.whole(0, 3));
    const auto costs = static_cast<Costs>(random.whole(0, 2));
    Items items(random.whole(1, most_items));
    for (AllocationItem& item : items)
        item = random_item(random, curves, costs, random.whole(1, most_options));
    return items;
}

double most_expensive(const Items& items) {
    double cost = 0;
    for (const AllocationItem& item : items) {
        double most = 0;
        for (const AllocationOption& option : item.options) most = std::max(most, option.cost);
        cost += item.count * most;
    }
    return cost;
}

/// A budget that means something: anywhere in the range, or exactly the cost of some choice.
double random_budget(Random& random, const Items& items) {
    const double least = kvplane::cheapest_cost(items);
    if (random.chance(0.5)) return least + random.real(0, 1.05) * (most_expensive(items) - least);
    std::vector<std::size_t> choice;
    for (const AllocationItem& item : items) choice.push_back(random.whole(0, item.options.size() - 1));
    return kvplane::evaluate_allocation(items, choice).cost;
}

void expect_consistent(const Items& items, double budget, const Allocation& allocation) {
    const Allocation again = kvplane::evaluate_allocation(items, allocation.choice);
    EXPECT_EQ(again.cost, allocation.cost);
    EXPECT_EQ(again.error, allocation.error);
    EXPECT_LE(allocation.cost, budget * (1 + 2e-9));
    EXPECT_GE(allocation.price, 0);
    EXPECT_TRUE(std::isfinite(allocation.price));
}

void expect_close(double a, double b) {
    EXPECT_NEAR(a, b, 1e-11 * std::max(std::abs(a), std::abs(b)));
}

// The menu of one item repeated, and the same curve for all.
Items same_menu(std::size_t count, const std::vector<AllocationOption>& menu, Random& random) {
    Items items;
    for (std::size_t i = 0; i < count; ++i) items.push_back({std::exp(random.real(-4, 4)), 1, menu});
    return items;
}

std::vector<AllocationOption> unit_menu(double ratio) {
    std::vector<AllocationOption> menu;
    for (int b = 0; b <= 8; ++b) menu.push_back({static_cast<double>(b), std::pow(ratio, -b)});
    return menu;
}

TEST(BitAllocation, HandComputed) {
    // Two channels of variance 8 and 1, three bits: 8/16 + 1/4 (2 and 1 bits) beats 8/64 + 1, 8/4 + 1/16 and
    // 8 + 1/64.
    const Items items = {{8, 1, unit_menu(4)}, {1, 1, unit_menu(4)}};
    for (const Allocation& a : {exact(items, 3), greedy(items, 3)}) {
        EXPECT_EQ(a.choice, (std::vector<std::size_t>{2, 1}));
        EXPECT_DOUBLE_EQ(a.error, 0.75);
        EXPECT_DOUBLE_EQ(a.cost, 3);
        EXPECT_DOUBLE_EQ(a.price, 0.375);  // the next steps would gain 8/16 - 8/64 and 1/4 - 1/16
    }
    const Allocation one = uniform(items, 3);
    EXPECT_EQ(one.choice, (std::vector<std::size_t>{1, 1}));
    EXPECT_DOUBLE_EQ(one.error, 2.25);
    // Four times the elements: a bit for the first costs four.
    EXPECT_EQ(exact({{8, 4, unit_menu(4)}, {1, 1, unit_menu(4)}}, 6).choice,
              (std::vector<std::size_t>{1, 2}));
}

TEST(BitAllocation, ExactEqualsBruteForce) {
    Random random(kvplane_test::seed());
    for (int trial = 0; trial < 6000; ++trial) {
        const Items items = random_items(random, 6, 5);
        const double budget = random_budget(random, items);
        const Allocation found = exact(items, budget);
        expect_consistent(items, budget, found);
        expect_close(found.error, brute_force(items, budget));
        ASSERT_FALSE(HasFailure()) << "trial " << trial << ", " << items.size() << " items, budget "
                                   << budget;
    }
}

TEST(BitAllocation, OrderOfMethods) {
    Random random(kvplane_test::seed(7));
    int strictly_better = 0, greedy_better = 0;
    for (int trial = 0; trial < 3000; ++trial) {
        const std::size_t options = random.whole(1, 9);
        Items items = random_items(random, 40, 1);
        const auto curves = static_cast<Curves>(random.whole(0, 3));
        const auto costs = static_cast<Costs>(random.whole(0, 1));
        for (AllocationItem& item : items) {
            item = random_item(random, curves, costs, options);
            std::swap(item.options.front(), item.options.back());
        }
        const double budget = random_budget(random, items);
        const Allocation e = exact(items, budget), g = greedy(items, budget);
        expect_consistent(items, budget, e);
        expect_consistent(items, budget, g);
        EXPECT_LE(e.error, g.error);
        strictly_better += e.error < g.error ? 1 : 0;
        try {
            const Allocation u = uniform(items, budget);
            expect_consistent(items, budget, u);
            EXPECT_LE(g.error, u.error);
            greedy_better += g.error < u.error ? 1 : 0;
        } catch (const kvplane::Error&) {
            // No common option fits: there is no uniform allocation to compare with.
        }
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
    // The comparisons are not between equals.
    EXPECT_GT(strictly_better, 300);
    EXPECT_GT(greedy_better, 300);
}

TEST(BitAllocation, GreedyIsExactOnConvexUnitSteps) {
    Random random(kvplane_test::seed(8));
    for (int trial = 0; trial < 500; ++trial) {
        Items items(random.whole(1, 60));
        const double ratio = random.real(1.5, 5), count = random.chance(0.5) ? 1 : 128;
        for (AllocationItem& item : items) {
            item = {std::exp(random.real(-6, 6)), count, unit_menu(ratio)};
            // Another convex curve with gains in no fixed ratio.
            if (random.chance(0.5)) {
                double gain = 1, left = 20;
                for (AllocationOption& option : item.options) {
                    option.distortion = left;
                    left -= gain;
                    gain *= random.real(0.1, 1);
                }
            }
        }
        const auto n = static_cast<kvplane::Index>(items.size());
        kvplane::MatrixD errors(n, 9), costs(n, 9);
        for (kvplane::Index i = 0; i < n; ++i)
            for (kvplane::Index o = 0; o < 9; ++o) {
                const AllocationItem& item = items[static_cast<std::size_t>(i)];
                errors(i, o) = item.weight * item.options[static_cast<std::size_t>(o)].distortion;
                costs(i, o) = item.count * item.options[static_cast<std::size_t>(o)].cost;
            }
        ASSERT_TRUE(kvplane::theory::greedy_is_exact(errors, costs));
        const double budget = count * static_cast<double>(random.whole(0, items.size() * 8));
        const Allocation e = exact(items, budget), g = greedy(items, budget);
        expect_close(e.error, g.error);
        // Here the lower bound at the price is reached.
        expect_close(kvplane::theory::allocation_lower_bound(errors, costs, e.price, budget), e.error);
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
}

TEST(BitAllocation, GreedyIsNotExactElsewhere) {
    // Where a step is larger than what is left, greedy has nothing to trade back.
    const Items items = {{1, 1, {{0, 10}, {3, 3}}}, {1, 1, {{0, 10}, {2, 6}}}, {1, 1, {{0, 10}, {2, 6}}}};
    EXPECT_DOUBLE_EQ(greedy(items, 4).error, 23);
    EXPECT_DOUBLE_EQ(exact(items, 4).error, 22);
    kvplane::MatrixD errors(2, 2), costs(2, 2);
    errors << 10, 3, 10, 6;
    costs << 0, 3, 0, 2;
    EXPECT_FALSE(kvplane::theory::greedy_is_exact(errors, costs));
}

TEST(BitAllocation, LowerBoundsHoldAtEveryPrice) {
    Random random(kvplane_test::seed(9));
    for (int trial = 0; trial < 1000; ++trial) {
        Items items(random.whole(1, 20));
        for (AllocationItem& item : items) item = random_item(random, Curves::noisy, Costs::real, 4);
        const double budget = random_budget(random, items);
        const auto n = static_cast<kvplane::Index>(items.size());
        kvplane::MatrixD errors(n, 4), costs(n, 4);
        for (kvplane::Index i = 0; i < n; ++i)
            for (kvplane::Index o = 0; o < 4; ++o) {
                const AllocationItem& item = items[static_cast<std::size_t>(i)];
                errors(i, o) = item.weight * item.options[static_cast<std::size_t>(o)].distortion;
                costs(i, o) = item.count * item.options[static_cast<std::size_t>(o)].cost;
            }
        const Allocation e = exact(items, budget);
        const double at_price = kvplane::theory::allocation_lower_bound(errors, costs, e.price, budget);
        const double scale = errors.rowwise().maxCoeff().sum() + e.price * budget;
        EXPECT_LE(at_price, e.error + 1e-9 * scale);
        for (const double price : {0.0, 0.5 * e.price, 2 * e.price, random.real(0, 10)})
            EXPECT_LE(kvplane::theory::allocation_lower_bound(errors, costs, price, budget),
                      at_price + 1e-9 * (scale + price * budget));
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
}

TEST(BitAllocation, HighRateBound) {
    Random random(kvplane_test::seed(10));
    for (int trial = 0; trial < 300; ++trial) {
        const std::size_t n = random.whole(1, 12);
        Items items;
        Eigen::VectorXd weights(static_cast<kvplane::Index>(n)), counts(weights.size());
        for (std::size_t i = 0; i < n; ++i) {
            AllocationItem item{std::exp(random.real(-4, 4)), std::floor(random.real(1, 5)), unit_menu(4)};
            weights[static_cast<kvplane::Index>(i)] = item.weight;
            counts[static_cast<kvplane::Index>(i)] = item.count;
            items.push_back(item);
        }
        const double budget = random_budget(random, items);
        EXPECT_GE(exact(items, budget).error * (1 + 1e-12),
                  kvplane::theory::high_rate_allocation_bound(weights, counts, budget));
    }
    // Tight: variances that are powers of 4 make all errors equal at 5, 4, 3 and 2 bits.
    Items items;
    Eigen::VectorXd weights(4);
    weights << 64, 16, 4, 1;
    for (const double w : weights) items.push_back({w, 1, unit_menu(4)});
    EXPECT_DOUBLE_EQ(exact(items, 14).error,
                     kvplane::theory::high_rate_allocation_bound(weights, Eigen::VectorXd::Ones(4), 14));
}

TEST(BitAllocation, MoreBudgetNeverCostsError) {
    Random random(kvplane_test::seed(11));
    for (int trial = 0; trial < 400; ++trial) {
        Items items = random_items(random, 15, 7);
        const double least = kvplane::cheapest_cost(items), most = most_expensive(items);
        double last[3] = {infinity, infinity, infinity};
        for (int step = 0; step <= 60; ++step) {
            const double budget = least + (most - least) * step / 59.0;
            const double errors[3] = {exact(items, budget).error, greedy(items, budget).error, [&] {
                                          try {
                                              return uniform(items, budget).error;
                                          } catch (const kvplane::Error&) {
                                              return infinity;
                                          }
                                      }()};
            for (int method = 0; method < 3; ++method) {
                EXPECT_LE(errors[method], last[method] * (1 + 1e-12))
                    << "method " << method << ", step " << step;
                last[method] = errors[method];
            }
        }
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
}

/// Knapsack by the book over whole costs; what the frontier is compared with where brute force cannot go.
double plain_dynamic_programme(const Items& items, std::size_t budget) {
    std::vector<double> best(budget + 1, 0.0);
    for (const AllocationItem& item : items) {
        std::vector<double> next(budget + 1, infinity);
        for (const AllocationOption& option : item.options) {
            const auto cost = static_cast<std::size_t>(std::lround(item.count * option.cost));
            for (std::size_t b = cost; b <= budget; ++b)
                next[b] = std::min(next[b], best[b - cost] + item.weight * option.distortion);
        }
        best.swap(next);
    }
    return best[budget];
}

TEST(BitAllocation, ExactEqualsPlainDynamicProgrammeOnLargerInstances) {
    Random random(kvplane_test::seed(12));
    for (int trial = 0; trial < 150; ++trial) {
        Items items(random.whole(20, 120));
        const bool tied = random.chance(0.3);  // gains per bit nearly equal: the bound settles little
        for (AllocationItem& item : items) {
            item = {tied ? 1.0 : std::exp(random.real(-3, 3)), std::floor(random.real(1, 12)), {}};
            for (std::size_t o = random.whole(2, 9); o-- > 0;) {
                const double cost = std::floor(random.real(0, 9));
                const double distortion = tied ? 10 * item.count - item.count * cost - random.real(0, 0.5)
                                               : std::pow(4, -cost) * random.real(0.3, 3);
                item.options.push_back({cost, distortion});
            }
        }
        const auto least = static_cast<std::size_t>(std::lround(kvplane::cheapest_cost(items)));
        const auto most = static_cast<std::size_t>(std::lround(most_expensive(items)));
        const std::size_t budget = random.whole(least, most);
        const Allocation found = exact(items, static_cast<double>(budget));
        expect_consistent(items, static_cast<double>(budget), found);
        expect_close(found.error, plain_dynamic_programme(items, budget));
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
}

TEST(BitAllocation, CostsThatAreNotExactInBinary) {
    // 1.58 as 158 hundredths: the same problem in whole numbers has the same answer, budget met to the last
    // bit.
    Random random(kvplane_test::seed(13));
    for (int trial = 0; trial < 20; ++trial) {
        Items real, whole;
        for (int i = 0; i < 40; ++i) {
            AllocationItem item{std::exp(random.real(-2, 2)), 1, {}};
            for (const double bits : {1.0, 1.58, 2.0, 4.0, 6.0, 8.0})
                for (const double grid : {0.25, 0.5, 1.0})
                    item.options.push_back({bits + grid, std::pow(4, -bits) / std::sqrt(grid)});
            real.push_back(item);
            for (AllocationOption& option : item.options) option.cost = std::round(100 * option.cost);
            whole.push_back(item);
        }
        const std::size_t budget = random.whole(5000, 20000);
        const Allocation found = exact(real, static_cast<double>(budget) / 100);
        expect_close(found.error, plain_dynamic_programme(whole, budget));
        expect_consistent(real, static_cast<double>(budget) / 100, found);
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
    // n times .1 sums to a little less or more than n / 10: both fit a budget of n / 10.
    for (std::size_t n = 1; n <= 100; ++n) {
        const Items items(n, AllocationItem{1, 1, {{0, 1}, {0.1, 0.5}, {1.58, 0}}});
        const double count = static_cast<double>(n), tenths = count / 10, all = 1.58 * count;
        for (const auto method :
             {AllocationMethod::exact, AllocationMethod::greedy, AllocationMethod::uniform}) {
            EXPECT_EQ(allocate(items, tenths, {.method = method}).error, 0.5 * count) << n;
            EXPECT_EQ(allocate(items, all, {.method = method}).error, 0) << n;
        }
    }
}

TEST(BitAllocation, ScaleOfCostsAndErrorsDoesNotMatter) {
    Random random(kvplane_test::seed(17));
    for (int trial = 0; trial < 300; ++trial) {
        Items items(random.whole(5, 40));
        for (AllocationItem& item : items) item = random_item(random, Curves::noisy, Costs::real, 6);
        const double budget = random_budget(random, items);
        const Allocation found = exact(items, budget);
        for (const double scale : {0x1p-20, 0x1p30})
            for (const double factor : {0x1p-40, 0x1p40}) {
                Items scaled = items;
                for (AllocationItem& item : scaled) {
                    item.count *= scale;
                    item.weight *= factor;
                }
                EXPECT_EQ(exact(scaled, budget * scale).choice, found.choice) << scale << " " << factor;
            }
        ASSERT_FALSE(HasFailure()) << "trial " << trial;
    }
}

TEST(BitAllocation, CurvesThatAreNeitherConvexNorMonotone) {
    // A gain that only the second step brings: plain marginal gain would never take the first.
    const Items cliff = {{1, 1, {{0, 10}, {1, 10}, {2, 0}}}, {1, 1, {{0, 3}, {1, 2}, {2, 1}}}};
    EXPECT_DOUBLE_EQ(greedy(cliff, 2).error, 3);
    EXPECT_DOUBLE_EQ(exact(cliff, 2).error, 3);
    // A hull step that does not fit is replaced by a shorter one of the same item.
    const Items shorter = {{1, 1, {{0, 10}, {1, 8}, {2, 7}, {4, 0}}}, {1, 1, {{2, 1}}}};
    EXPECT_DOUBLE_EQ(greedy(shorter, 3.5).error, 9);
    EXPECT_DOUBLE_EQ(greedy(shorter, 4.5).error, 8);
    // More bits, more error: never chosen, whatever the budget.
    const Items rising = {{1, 1, {{0, 2}, {1, 1}, {2, 5}, {3, 0.5}, {4, 7}}}};
    for (const double budget : {0.0, 1.0, 2.0, 3.0, 4.0, 100.0}) {
        const double best = budget < 1 ? 2 : budget < 3 ? 1 : 0.5;
        EXPECT_DOUBLE_EQ(exact(rising, budget).error, best) << budget;
        EXPECT_DOUBLE_EQ(greedy(rising, budget).error, best) << budget;
        EXPECT_DOUBLE_EQ(uniform(rising, budget).error, best) << budget;
    }
    // Unordered menus are as good as ordered ones.
    EXPECT_EQ(exact({{1, 1, {{4, 0}, {0, 4}, {2, 1}}}}, 2).choice, std::vector<std::size_t>{2});
}

TEST(BitAllocation, Edges) {
    EXPECT_TRUE(exact({}, 0).choice.empty());
    EXPECT_TRUE(greedy({}, 5).choice.empty());
    EXPECT_TRUE(uniform({}, 5).choice.empty());
    EXPECT_EQ(kvplane::cheapest_cost(Items{}), 0);
    // One option: no choice, whatever the curve; the budget may be exactly its cost.
    EXPECT_EQ(exact({{1, 3, {{2, 7}}}}, 6).error, 7);
    // Weight 0: nothing to gain, so nothing is spent. Count 0: all is free, so the best is taken.
    EXPECT_EQ(exact({{0, 1, {{4, 1}, {1, 9}}}}, 8).choice, std::vector<std::size_t>{1});
    EXPECT_EQ(exact({{1, 0, {{4, 1}, {1, 9}}}}, 0).choice, std::vector<std::size_t>{0});
    // A budget that buys everything has no price; unspent bits stay unspent.
    const Allocation all = exact({{1, 1, unit_menu(4)}}, 1e6);
    EXPECT_EQ(all.choice, std::vector<std::size_t>{8});
    EXPECT_EQ(all.cost, 8);
    EXPECT_EQ(all.price, 0);
    // Very large and very small numbers.
    EXPECT_EQ(exact({{1e-300, 1, unit_menu(4)}, {1e300, 1, unit_menu(4)}}, 8).choice,
              (std::vector<std::size_t>{0, 8}));
    EXPECT_EQ(exact({{1, 1e15, unit_menu(4)}, {4, 1e15, unit_menu(4)}}, 3e15).choice,
              (std::vector<std::size_t>{1, 2}));
    // Menus of different length: an index counts as common up to the shortest.
    EXPECT_EQ(uniform({{1, 1, unit_menu(4)}, {1, 1, {{0, 1}, {1, 0.5}}}}, 16).choice,
              (std::vector<std::size_t>{1, 1}));
}

TEST(BitAllocation, ThousandsOfItems) {
    // A latent schedule over layers and channels, and joint widths and group sizes: the sizes that the
    // library's own recipes reach. Exact, or this test would be refused; quick, or it would time out.
    Random random(kvplane_test::seed(14));
    std::vector<AllocationOption> noisy = unit_menu(4);
    for (AllocationOption& option : noisy) option.distortion *= random.real(0.5, 2);
    for (const auto& menu : {unit_menu(4), noisy}) {
        const Items items = same_menu(8000, menu, random);
        for (const double mean : {0.3, 1.25, 3.3}) {
            const Allocation e = exact(items, mean * 8000), g = greedy(items, mean * 8000);
            EXPECT_LE(e.error, g.error);
            EXPECT_GE(e.error, g.error - e.price * 8);
        }
    }
    std::vector<AllocationOption> joint;
    for (const double bits : {1.0, 1.58, 2.0, 4.0, 6.0, 8.0})
        for (const double grid : {0.25, 0.5, 1.0})
            joint.push_back({bits + grid, std::pow(4, -bits) * std::pow(grid, -0.4)});
    const Items layers = same_menu(160, joint, random);
    double last = infinity;
    for (double mean = 1.25; mean <= 9; mean += 0.25) {
        const Allocation e = exact(layers, mean * 160);
        EXPECT_LE(e.error, greedy(layers, mean * 160).error);
        EXPECT_LE(e.error, last);
        last = e.error;
    }
}

/// Costs in no ratio and a gain that is nearly the same per bit everywhere: subset sum.
Items hard_instance(std::size_t count) {
    Random random(15);
    Items items;
    for (std::size_t i = 0; i < count; ++i) {
        const double cost = random.real(1, 2);
        items.push_back({1, 1, {{0, 3}, {cost, 3 - cost}}});
    }
    return items;
}

TEST(BitAllocation, AFrontierTooLargeIsRefused) {
    const std::string sentence = kvplane_test::refusal(
        ErrorCode::option, [] { allocate(hard_instance(200), 100, {.max_states = 100000}); });
    EXPECT_NE(sentence.find("more than 100000 states"), std::string::npos) << sentence;
    EXPECT_NE(sentence.find("raise max_states"), std::string::npos) << sentence;
    // Small ones of the same kind are solved.
    const Items small = hard_instance(12);
    expect_close(exact(small, 9).error, brute_force(small, 9));
}

TEST(BitAllocation, RefusesBadInput) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto refused = [](ErrorCode code, const Items& items, double budget,
                            AllocationSettings settings = {}) {
        std::string sentence;
        for (const auto method :
             {AllocationMethod::exact, AllocationMethod::greedy, AllocationMethod::uniform}) {
            settings.method = method;
            sentence = kvplane_test::refusal(code, [&] { allocate(items, budget, settings); });
        }
        return sentence;
    };
    const std::vector<AllocationOption> menu = unit_menu(4);
    EXPECT_NE(refused(ErrorCode::not_finite, {{1, 1, menu}, {nan, 1, menu}}, 9).find("weight of item 1"),
              std::string::npos);
    refused(ErrorCode::not_finite, {{1, infinity, menu}}, 9);
    refused(ErrorCode::not_finite, {{1, 1, {{1, nan}}}}, 9);
    refused(ErrorCode::not_finite, {{1, 1, {{infinity, 1}}}}, 9);
    refused(ErrorCode::not_finite, {{1e200, 1, {{1, 1e200}}}}, 9);
    refused(ErrorCode::not_finite, {{1, 1, {{1, 1e308}}}, {1, 1, {{1, 1e308}}}}, 9);
    refused(ErrorCode::not_finite, {{1, 1, menu}}, nan);
    refused(ErrorCode::not_finite, {{1, 1, menu}}, infinity);
    refused(ErrorCode::option, {{-1, 1, menu}}, 9);
    refused(ErrorCode::option, {{1, -1, menu}}, 9);
    refused(ErrorCode::option, {{1, 1, {{-1, 1}}}}, 9);
    refused(ErrorCode::option, {{1, 1, {{1, -1}}}}, 9);
    EXPECT_NE(refused(ErrorCode::option, {{1, 1, menu}, {1, 1, {}}}, 9).find("item 1 has no options"),
              std::string::npos);
    refused(ErrorCode::option, {{1, 1, menu}}, -1);

    const Items floor = {{1, 2, {{1.5, 1}, {3, 0}}}, {1, 1, {{1, 1}, {2, 0}}}};
    const std::string sentence = refused(ErrorCode::option, floor, 3.9);
    EXPECT_NE(sentence.find("costs 4 bits"), std::string::npos) << sentence;
    EXPECT_EQ(kvplane::cheapest_cost(floor), 4);
    EXPECT_EQ(exact(floor, 4).error, 2);
    // Feasible for some choice, but for no common one: uniform alone refuses.
    const Items crossed = {{1, 1, {{1, 1}, {4, 0}}}, {1, 1, {{4, 1}, {1, 0}}}};
    EXPECT_EQ(exact(crossed, 3).error, 1);
    EXPECT_NE(kvplane_test::refusal(ErrorCode::option, [&] { uniform(crossed, 3); }).find("costs 5 bits"),
              std::string::npos);

    kvplane_test::refusal(ErrorCode::shape,
                          [&] { kvplane::evaluate_allocation(floor, std::vector<std::size_t>{0}); });
    kvplane_test::refusal(ErrorCode::index, [&] {
        kvplane::evaluate_allocation(floor, std::vector<std::size_t>{0, 2});
    });
    kvplane_test::refusal(ErrorCode::not_finite, [&] { kvplane::cheapest_cost(Items{{nan, 1, menu}}); });
}

}  // namespace
