#include "preprocess.hpp"

#include <algorithm>
#include <cmath>
#include <map>

namespace {

// Weights are integers with 22 bits after the point: 8 bits of pixel and two of overshoot fill a signed 32-bit sum.
constexpr int BITS = 22;
constexpr std::int32_t ONE = 1 << BITS, HALF = ONE / 2;

struct Filter {
    double (*weight)(double);
    double support;
};

// Each is written term by term as Pillow orders it, so that the last bit of the weight is the same too.
double bilinear(double x) {
    x = std::abs(x);
    return x < 1 ? 1 - x : 0;
}

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

double sinc(double x) {
    if (x == 0) return 1;
    x *= 3.14159265358979323846;
    return std::sin(x) / x;
}

double lanczos(double x) { return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

const std::map<std::string, Filter> FILTERS = {{"bilinear", {bilinear, 1}}, {"bicubic", {bicubic, 2}}, {"lanczos", {lanczos, 3}}};

// One output pixel: the weights of the input pixels from `first` on. None at all gives black.
struct Taps {
    int first;
    std::vector<std::int32_t> weights;
};

// Pillow holds the box in single precision and takes the difference in it.
double scale_of(float start, float end, int size) { return static_cast<double>(end - start) / size; }

std::vector<Taps> nearest_taps(int length, float start, float end, int size) {
    std::vector<Taps> all;
    const double scale = scale_of(start, end, size);
    double position = start + scale * 0.5;
    for (int place = 0; place < size; ++place, position += scale) {  // added up, not multiplied: so does Pillow
        const int index = static_cast<int>(position);
        if (index < length)
            all.push_back({index, {ONE}});
        else
            all.push_back({0, {}});
    }
    return all;
}

std::vector<Taps> filter_taps(int length, float start, float end, int size, const Filter& filter) {
    std::vector<Taps> all;
    std::vector<double> exact;
    const double scale = scale_of(start, end, size);
    const double stretch = std::max(scale, 1.0), reach = filter.support * stretch, shrink = 1 / stretch;
    for (int place = 0; place < size; ++place) {
        const double centre = start + (place + 0.5) * scale;
        const int first = std::max(0, static_cast<int>(centre - reach + 0.5));
        const int last = std::min(length, static_cast<int>(centre + reach + 0.5));
        double total = 0;
        exact.clear();
        for (int index = first; index < last; ++index) {
            exact.push_back(filter.weight((index - centre + 0.5) * shrink));
            total += exact.back();
        }
        Taps taps{first, {}};
        for (double weight : exact) {
            if (total != 0) weight /= total;
            taps.weights.push_back(static_cast<std::int32_t>(weight * ONE + (weight < 0 ? -0.5 : 0.5)));
        }
        all.push_back(std::move(taps));
    }
    return all;
}

// One pass: every row (across) or column (down) from `start` to `end` becomes `size` pixels.
Picture resampled(const Picture& in, bool across, double start, double end, int size, const std::string& interpolation) {
    const int length = across ? in.width : in.height, lines = across ? in.height : in.width;
    const float from = static_cast<float>(start), to = static_cast<float>(end);
    const auto found = FILTERS.find(interpolation);
    const auto taps = found == FILTERS.end() ? nearest_taps(length, from, to, size) : filter_taps(length, from, to, size, found->second);

    Picture out{across ? size : in.width, across ? in.height : size, {}};
    out.rgb.resize(std::size_t{3} * out.width * out.height);
    const std::size_t in_row = std::size_t{3} * in.width, out_row = std::size_t{3} * out.width;
    const std::size_t in_line = across ? in_row : 3, in_step = across ? 3 : in_row;
    const std::size_t out_line = across ? out_row : 3, out_step = across ? 3 : out_row;
    for (int line = 0; line < lines; ++line) {
        for (int place = 0; place < size; ++place) {
            for (int channel = 0; channel < 3; ++channel) {
                const std::uint8_t* pixel = in.rgb.data() + line * in_line + taps[place].first * in_step + channel;
                std::int32_t sum = HALF;
                for (const std::int32_t weight : taps[place].weights) {
                    sum += *pixel * weight;
                    pixel += in_step;
                }
                out.rgb[line * out_line + place * out_step + channel] = static_cast<std::uint8_t>(std::clamp(sum >> BITS, 0, 255));
            }
        }
    }
    return out;
}

}  // namespace

bool known(const Rule& rule) {
    return rule.size > 0 && rule.crop_pct > 0 && rule.crop_pct <= 1 && (rule.crop_mode == "center" || rule.crop_mode == "squash") &&
           (rule.interpolation == "nearest" || FILTERS.count(rule.interpolation));
}

Picture preprocess(const Picture& picture, const Rule& rule) {
    const double width = picture.width, height = picture.height, side = std::min(width, height) * rule.crop_pct;
    const bool squash = rule.crop_mode == "squash";
    const double across = squash ? width : side, down = squash ? height : side;
    const auto narrow = resampled(picture, true, (width - across) / 2, (width + across) / 2, rule.size, rule.interpolation);
    return resampled(narrow, false, (height - down) / 2, (height + down) / 2, rule.size, rule.interpolation);
}
