// examples/options.hpp: the command line of a program. CLI11 does the work in options.cpp, so that programs which
// include this compile quickly.
//
//     Options options("dump", "Writes keys, values and queries of a model.");
//     options.number("--tokens N", tokens, {.least = 1}, "of the text");
//     return options.run(count, arguments, [&] { dump(tokens); });
#pragma once

#include <cstddef>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace CLI {
class App;
}  // namespace CLI

namespace kvplane_examples {

/// Every option is bound to a variable, whose value before parsing is the default that --help shows. A name is
/// "--name VALUE", "--flag", or "VALUE" for arguments that stand without a name. Numbers are read whole and within
/// their range; whatever belongs to no option is refused.
class Options {
  public:
    using Number = std::ptrdiff_t;  // kvplane::Index
    using Texts = std::vector<std::string>;
    struct Range {
        Number least = 0, most = std::numeric_limits<Number>::max();
    };
    /// Throws where the text is no value of the option.
    using Check = std::function<void(const std::string&)>;
    enum class Need { optional, required };

    Options(const std::string& program, const std::string& summary);
    ~Options();
    Options(const Options&) = delete;
    Options& operator=(const Options&) = delete;

    void flag(const std::string& name, bool& value, const std::string& help);
    void text(const std::string& name, std::string& value, const std::string& help,
              Need need = Need::optional, const Check& check = {});
    void number(const std::string& name, Number& value, Range range, const std::string& help);
    /// A finite number from 0 on.
    void real(const std::string& name, double& value, const std::string& help);
    void choice(const std::string& name, std::string& value, const Texts& choices, const std::string& help);
    /// A,B,C
    void texts(const std::string& name, Texts& values, const std::string& help, Need need = Need::optional,
               const Check& check = {});
    void numbers(const std::string& name, std::vector<Number>& values, Range range, const std::string& help);
    enum class Count { at_most_one, any };
    /// Arguments without a name.
    void arguments(const std::string& name, Texts& values, Count count, const std::string& help);
    /// A file that run() will write. That this is possible is checked before any work starts.
    void output_file(const std::string& name, std::string& path, const std::string& help,
                     Need need = Need::optional);
    /// The same of a folder, which is made where there is none.
    void output_folder(const std::string& name, std::string& path, const std::string& help);
    /// Stands below the options in --help.
    void footer(const std::string& text);

    /// Parses, runs the body, and makes sure that all output was written. Returns the program's exit code: 1, with
    /// a sentence on stderr, where an option is wrong, the body throws, or stdout takes no more.
    int run(int count, char** arguments, const std::function<void()>& body);

  private:
    void add(const std::string& name, const std::string& standard, const std::string& help, Need need,
             const Check& assign);

    std::string program_;
    std::unique_ptr<CLI::App> app_;
    std::vector<std::function<void()>> checks_;  // of the arguments together
};

}  // namespace kvplane_examples
