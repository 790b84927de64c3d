// examples/plot.hpp: series of points as CSV and, where gnuplot is installed, as SVG.
#pragma once

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "kvplane/error.hpp"

namespace kvplane_examples {

struct PlotPoint {
    double x, y;
    std::string label = {};  ///< written beside the point; empty: none
};

struct PlotSeries {
    std::string name;  ///< in the legend
    std::vector<PlotPoint> points;
    bool is_line = true;  ///< whether the points are joined
    int colour = -1;      ///< of the scheme; -1: the next one
};

/// Series in one diagram whose y axis is logarithmic.
struct Plot {
    std::string name;  ///< of the files, without .csv and .svg
    std::string title, x_label, y_label;
    std::vector<PlotSeries> series;
};

namespace detail {

/// As gnuplot reads it between single quotes.
inline std::string quoted(std::string_view text) {
    std::string result = "'";
    for (const char c : text) result += c == '\'' ? std::string("''") : std::string(1, c);
    return result + "'";
}

/// A field of a CSV file.
inline std::string field(std::string_view text) {
    if (text.find_first_of(",\"\n") == std::string_view::npos) return std::string(text);
    std::string result = "\"";
    for (const char c : text) result += c == '"' ? std::string("\"\"") : std::string(1, c);
    return result + "\"";
}

inline void write_csv(const std::filesystem::path& path, const Plot& plot) {
    std::ofstream file(path);
    file << "series,label," << field(plot.x_label) << ',' << field(plot.y_label) << '\n';
    for (const PlotSeries& series : plot.series)
        for (const PlotPoint& point : series.points)
            file << field(series.name) << ',' << field(point.label) << ',' << point.x << ',' << point.y
                 << '\n';
    file.flush();
    kvplane::require(file.good(), kvplane::ErrorCode::io, path.string(), ": cannot be written");
}

/// The points above 0, and the series that have any: a logarithmic axis has no place for others.
inline std::vector<PlotSeries> drawable(const Plot& plot) {
    std::vector<PlotSeries> all;
    for (PlotSeries series : plot.series) {
        std::erase_if(series.points, [](const PlotPoint& point) { return !(point.y > 0.0); });
        if (!series.points.empty()) all.push_back(std::move(series));
    }
    return all;
}

inline std::string gnuplot_script(const std::filesystem::path& svg, const Plot& plot,
                                  const std::vector<PlotSeries>& all) {
    // After Paul Tol's "muted" scheme, which the colour-blind can tell apart.
    constexpr std::array colours{"332288", "cc6677", "117733", "ddaa33", "88ccee", "882255",
                                 "44aa99", "999933", "aa4499", "000000", "888888", "ee7733"};
    std::ostringstream script;
    script << "set terminal svg size 1080,560 noenhanced font 'sans-serif,14' background rgb 'white'\n"
           << "set output " << quoted(svg.string()) << "\nset title " << quoted(plot.title) << "\nset xlabel "
           << quoted(plot.x_label) << "\nset ylabel " << quoted(plot.y_label)
           << "\nset logscale y\nset format y '%g'\nset offsets graph 0.03, graph 0.1, 0, 0\n"
           << "set grid\nset key outside right top Left reverse samplen 2\n";
    for (std::size_t s = 0; s < all.size(); ++s) {
        script << "$series" << s << " << end\n";
        for (const PlotPoint& point : all[s].points)
            // Longer ones would cover other points; the CSV file has all.
            script << point.x << ' ' << point.y << " \"" << (point.label.size() <= 26 ? point.label : "")
                   << "\"\n";
        script << "end\n";
    }
    script << "plot ";
    for (std::size_t s = 0; s < all.size(); ++s) {
        script << (s > 0 ? ", " : "") << "$series" << s << " using 1:2 with "
               << (all[s].is_line ? "linespoints lw 2 ps 0.7 pt 7" : "points ps 0.7 pt 6") << " lc rgb '#"
               << colours[(all[s].colour >= 0 ? static_cast<std::size_t>(all[s].colour) : s) % colours.size()]
               << "' title " << quoted(all[s].name);
        if (!all[s].points.front().label.empty())
            script << ", $series" << s << " using 1:2:3 with labels left offset 0.6,0.4 font ',11' notitle";
    }
    script << '\n';
    return script.str();
}

}  // namespace detail

/// Writes NAME.csv and, where gnuplot is installed, NAME.svg into a folder, which is made where there is none. Says on
/// stderr why nothing is drawn. Throws Error (io).
inline void write_plot(const std::filesystem::path& folder, const Plot& plot) {
    std::error_code failed;
    std::filesystem::create_directories(folder, failed);
    kvplane::require(!failed, kvplane::ErrorCode::io, folder.string(), ": ", failed.message());
    detail::write_csv(folder / (plot.name + ".csv"), plot);

    const std::vector<PlotSeries> all = detail::drawable(plot);
    const std::filesystem::path svg = folder / (plot.name + ".svg");
    if (std::system("command -v gnuplot >/dev/null 2>&1") != 0 || all.empty()) {
        std::fprintf(stderr, "%s is not drawn: %s\n", svg.c_str(),
                     all.empty() ? "no point is above 0" : "gnuplot is not installed");
        return;
    }
    const std::string script = detail::gnuplot_script(svg, plot, all);
    FILE* const gnuplot = popen("gnuplot", "w");
    kvplane::require(gnuplot != nullptr, kvplane::ErrorCode::io, "gnuplot cannot be started");
    std::fwrite(script.data(), 1, script.size(), gnuplot);
    kvplane::require(pclose(gnuplot) == 0, kvplane::ErrorCode::io, svg.string(),
                     ": gnuplot could not draw it");
}

}  // namespace kvplane_examples
