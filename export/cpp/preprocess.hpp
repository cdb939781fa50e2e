// Pictures to the exact pixels the network sees: what bingo_edge/image.py does through Pillow, bit for bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Picture {
    int width, height;
    std::vector<std::uint8_t> rgb;  // row by row, three bytes a pixel
};

// The contract's "input.size" and "preprocess".
struct Rule {
    int size;
    double crop_pct;
    std::string interpolation, crop_mode;
};

// Whether this file can do all that the rule asks.
bool known(const Rule& rule);

// The centred square of side crop_pct x the shorter side ("squash": the whole picture), resized with antialiasing to size x size.
Picture preprocess(const Picture& picture, const Rule& rule);
