// examples/options.cpp: see options.hpp.
#include "options.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <system_error>

namespace kvplane_examples {

namespace {

constexpr std::size_t option_width = 22, help_width = 78;

/// The text in lines of at most help_width characters. Lines that begin with a space stay as they are.
std::string wrapped(const std::string& text) {
    std::string result, line;
    const auto end_line = [&] {
        if (!line.empty()) result += line + '\n';
        line.clear();
    };
    std::istringstream lines(text);
    for (std::string source; std::getline(lines, source);) {
        if (source.starts_with(' ')) {  // a list, laid out by hand
            end_line();
            result += source + '\n';
            continue;
        }
        std::istringstream words(source);
        for (std::string word; words >> word;) {
            if (!line.empty() && line.size() + 1 + word.size() > help_width) end_line();
            line += (line.empty() ? "" : " ") + word;
        }
    }
    end_line();
    if (!result.empty()) result.pop_back();
    return result;
}

std::string joined(const Options::Texts& texts) {
    std::string all;
    for (const std::string& text : texts) all += (all.empty() ? "" : ",") + text;
    return all;
}

Options::Texts split(const std::string& name, const std::string& text) {
    Options::Texts items;
    std::istringstream stream(text + ',');
    for (std::string item; std::getline(stream, item, ',');) {
        if (item.empty()) throw std::invalid_argument(name + ": '" + text + "', expected a list A,B,C");
        items.push_back(item);
    }
    return items;
}

Options::Number parse_number(const std::string& name, const std::string& text, Options::Range range) {
    Options::Number value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && value >= range.least &&
        value <= range.most)
        return value;
    std::string expected = " from " + std::to_string(range.least);
    expected += range.most == Options::Range().most ? " on" : " to " + std::to_string(range.most);
    throw std::invalid_argument(name + ": '" + text + "', expected a whole number" + expected);
}

double parse_real(const std::string& name, const std::string& text) {
    double value = 0.0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && std::isfinite(value) && value >= 0.0)
        return value;
    throw std::invalid_argument(name + ": '" + text + "', expected a number from 0 on");
}

std::string number_text(double value) {
    std::ostringstream text;
    text << value;
    return text.str();
}

/// Throws unless the file can be written. Leaves it as it is, or none where there was none.
void require_writable(const std::string& path) {
    const auto fail = [&](const char* reason) {
        throw std::runtime_error(path + ": cannot be written: " + reason);
    };
    std::error_code unknown;
    if (std::filesystem::is_directory(path, unknown)) fail("it is a folder");
    if (std::filesystem::exists(path, unknown)) {
        if (::access(path.c_str(), W_OK) != 0) fail(std::strerror(errno));
        return;
    }
    const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (file < 0) fail(std::strerror(errno));
    ::close(file);
    ::unlink(path.c_str());
}

void require_writable_folder(const std::string& path) {
    std::error_code failed;
    std::filesystem::create_directories(path, failed);
    if (failed) throw std::runtime_error(path + ": " + failed.message());
    if (::access(path.c_str(), W_OK) != 0)
        throw std::runtime_error(path + ": cannot be written: " + std::strerror(errno));
}

void require_output() {
    errno = 0;
    std::cout.flush();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0 || !std::cout)
        throw std::runtime_error(std::string("standard output cannot be written") +
                                 (errno != 0 ? std::string(": ") + std::strerror(errno) : ""));
}

}  // namespace

Options::Options(const std::string& program, const std::string& summary)
    : program_(program), app_(std::make_unique<CLI::App>(wrapped(summary), program)) {
    app_->set_help_flag("--help", "Prints this");
    app_->get_formatter()->column_width(option_width);
    app_->get_formatter()->label("Usage", "usage");
}

Options::~Options() = default;

void Options::add(const std::string& name, const std::string& standard, const std::string& help, Need need,
                  const Check& assign) {
    const std::size_t space = name.find(' ');
    const bool required = need == Need::required;
    const std::string shown = required ? " (required)" : standard.empty() ? "" : " (" + standard + ")";
    CLI::Option* option =
        app_->add_option_function<std::string>(name.substr(0, space), assign, wrapped(help + shown));
    option->take_last();
    // Not CLI11's required(): unknown arguments are to be named before missing ones.
    if (required)
        checks_.push_back([option, text = option->get_name()] {
            if (option->count() == 0) throw std::invalid_argument(text + " is required; --help explains it");
        });
    option->type_name(space == std::string::npos ? "" : name.substr(space + 1));
}

void Options::flag(const std::string& name, bool& value, const std::string& help) {
    app_->add_flag(name, value, wrapped(help));
}

void Options::text(const std::string& name, std::string& value, const std::string& help, Need need,
                   const Check& check) {
    add(name, value, help, need, [&value, check](const std::string& text) {
        if (check) check(text);
        value = text;
    });
}

void Options::number(const std::string& name, Number& value, Range range, const std::string& help) {
    add(name, std::to_string(value), help, Need::optional,
        [&value, range, option = name.substr(0, name.find(' '))](const std::string& text) {
            value = parse_number(option, text, range);
        });
}

void Options::real(const std::string& name, double& value, const std::string& help) {
    add(name, number_text(value), help, Need::optional,
        [&value, option = name.substr(0, name.find(' '))](const std::string& text) {
            value = parse_real(option, text);
        });
}

void Options::choice(const std::string& name, std::string& value, const Texts& choices,
                     const std::string& help) {
    add(name, value, help, Need::optional,
        [&value, choices, option = name.substr(0, name.find(' '))](const std::string& text) {
            if (std::find(choices.begin(), choices.end(), text) == choices.end())
                throw std::invalid_argument(option + ": '" + text + "', expected one of " + joined(choices));
            value = text;
        });
}

void Options::texts(const std::string& name, Texts& values, const std::string& help, Need need,
                    const Check& check) {
    add(name, joined(values), help, need,
        [&values, check, option = name.substr(0, name.find(' '))](const std::string& text) {
            const Texts items = split(option, text);
            if (check) std::for_each(items.begin(), items.end(), check);
            values = items;
        });
}

void Options::numbers(const std::string& name, std::vector<Number>& values, Range range,
                      const std::string& help) {
    Texts standard;
    for (const Number value : values) standard.push_back(std::to_string(value));
    add(name, joined(standard), help, Need::optional,
        [&values, range, option = name.substr(0, name.find(' '))](const std::string& text) {
            std::vector<Number> items;
            for (const std::string& item : split(option, text))
                items.push_back(parse_number(option, item, range));
            values = items;
        });
}

void Options::arguments(const std::string& name, Texts& values, Count count, const std::string& help) {
    CLI::Option* option = app_->add_option(name, values, wrapped(help))->type_name("");
    if (count == Count::at_most_one) option->expected(0, 1);
}

void Options::output_file(const std::string& name, std::string& path, const std::string& help, Need need) {
    text(name, path, help, need, require_writable);
}

void Options::output_folder(const std::string& name, std::string& path, const std::string& help) {
    text(name, path, help, Need::optional, require_writable_folder);
}

void Options::footer(const std::string& text) {
    app_->footer(text);
}

int Options::run(int count, char** arguments, const std::function<void()>& body) {
    try {
        // Where stdout is closed, the next file that is opened would get its number and what is printed.
        if (::fcntl(STDOUT_FILENO, F_GETFD) == -1) throw std::runtime_error("standard output is closed");
        try {
            app_->parse(count, arguments);
        } catch (const CLI::CallForHelp&) {
            std::cout << app_->help();
            require_output();
            return 0;
        }
        for (const auto& check : checks_) check();
        body();
        require_output();
        return 0;
    } catch (const CLI::ArgumentMismatch& error) {
        const std::string reason = error.what();
        const char* missing = reason.find("At Most") == std::string::npos ? "a value is missing: " : "";
        std::fprintf(stderr, "%s: %s%s\n", program_.c_str(), missing, reason.c_str());
    } catch (const CLI::ParseError& error) {
        std::fprintf(stderr, "%s: %s; --help lists the options\n", program_.c_str(), error.what());
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", program_.c_str(), error.what());
    }
    return 1;
}

}  // namespace kvplane_examples
