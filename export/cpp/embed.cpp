// embed MODEL PICTURE ..: a line a picture on stdout, its path and the values of its embedding, tab-separated; with
// --classes, of a file that has them, path, class, probability and, where it knows one, distance to the nearest class.
// A PICTURE is a binary PPM (P6), preprocessed as bingo-edge does, or NAME.rgb: size x size x 3 bytes that are preprocessed already.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "preprocess.hpp"

namespace {

const char* const USAGE =
    "usage: embed [--pixels|--classes] MODEL.onnx PICTURE.ppm|NAME.rgb ..\n"
    "Prints path and embedding; with --classes, path, class, probability and distance to the nearest class, where the file knows it;\n"
    "with --pixels, writes the network's input instead, size x size x 3 bytes a picture.\n";
const char* const NONE = "none of these";

struct Refused : std::runtime_error {
    Refused(const std::string& expected, const std::string& found, const std::string& todo)
        : std::runtime_error("expected " + expected + ", found " + found + "; " + todo) {}
};

struct Contract {
    std::string input;
    std::size_t dim;
    Rule rule;
    bool floats;                   // float32 by channels, less mean and by std; else bytes as they are
    std::vector<float> mean, std;  // on the scale of 0 to 255
    bool embedding;
    std::vector<std::string> classes;  // in the order of scores; empty where the file has none
    bool distance;
    double threshold;  // the distance above which a picture is of no class
};

Contract contract_of(const Ort::Session& session, const std::string& path) {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("bingo_compress", allocator);
    const std::string again = "export the model again with bingo-compress";
    if (!text) throw Refused("an ONNX file with \"bingo_compress\" metadata", path + " without it", again);
    try {
        const auto whole = nlohmann::json::parse(text.get());
        const auto &given = whole.at("input"), &rule = whole.at("preprocess");
        Contract contract{given.at("name").get<std::string>(), whole.at("embedding_dim").get<std::size_t>(), {}, false, {}, {}, true, {}, false, 0};
        contract.rule = {given.at("size").get<int>(), rule.at("crop_pct").get<double>(), rule.at("interpolation").get<std::string>(),
                         rule.value("crop_mode", "center")};
        contract.floats = given.at("layout") == "NCHW" && given.at("dtype") == "float32";
        const bool bytes = given.at("layout") == "NHWC" && given.at("dtype") == "uint8";
        if (whole.at("format") != 1 || !(bytes || contract.floats) || given.at("color") != "RGB" || !known(contract.rule))
            throw Refused("format 1, NHWC uint8 or NCHW float32 RGB and a rule that this program knows",
                          given.dump() + " " + rule.dump(), "update it");
        if (contract.floats) {
            contract.mean = given.at("mean").get<std::vector<float>>();
            contract.std = given.at("std").get<std::vector<float>>();
            if (contract.mean.size() != 3 || contract.std.size() != 3) throw Refused("mean and std of three channels", given.dump(), again);
        }
        const auto outputs = whole.value("outputs", nlohmann::json{{"embedding", ""}});
        contract.embedding = outputs.contains("embedding");
        if (outputs.contains("scores")) contract.classes = whole.at("classes").get<std::vector<std::string>>();
        const auto threshold = whole.value("head", nlohmann::json::object()).value("threshold", nlohmann::json());
        contract.distance = outputs.contains("distance") && threshold.is_number();
        if (contract.distance) contract.threshold = threshold.get<double>();
        return contract;
    } catch (const nlohmann::json::exception& error) {
        throw Refused("a whole contract in the metadata", path + " (" + error.what() + ")", again);
    }
}

std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(file), {}};
    if (!file) throw Refused("a picture", "no file that can be read at " + path, "check the path");
    return bytes;
}

// The next number of a PPM header; comments run from # to the end of the line. -1: no number of up to 9 digits.
int header_number(const std::string& bytes, std::size_t& at) {
    const auto blank = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
    while (at < bytes.size() && (blank(bytes[at]) || bytes[at] == '#'))
        at = bytes[at] == '#' ? std::min(bytes.find('\n', at), bytes.size()) : at + 1;
    int number = 0;
    const std::size_t start = at;
    for (; at < bytes.size() && bytes[at] >= '0' && bytes[at] <= '9' && at - start < 9; ++at) number = number * 10 + (bytes[at] - '0');
    return at > start && at < bytes.size() && blank(bytes[at]) ? number : -1;
}

Picture ppm(const std::string& bytes, const std::string& path) {
    std::size_t at = 2;
    const std::string todo = "convert it, for example with ImageMagick";
    if (bytes.compare(0, 2, "P6") != 0) throw Refused("a binary PPM (P6) or a file NAME.rgb", path, todo);
    const int width = header_number(bytes, at), height = header_number(bytes, at), highest = header_number(bytes, at);
    if (width < 1 || height < 1 || highest != 255) throw Refused("a PPM of 8 bits and at least a pixel", path, todo);
    ++at;  // a single blank ends the header
    const std::size_t row = std::size_t{3} * width;
    if ((bytes.size() - at) / row < static_cast<std::size_t>(height))
        throw Refused("a whole picture", path + " cut short", "copy it again");
    return {width, height, {bytes.begin() + at, bytes.begin() + at + row * height}};
}

// The network's input, size x size x 3 bytes.
std::vector<std::uint8_t> pixels_of(const std::string& path, const Rule& rule) {
    const std::string bytes = contents(path);
    if (std::filesystem::path(path).extension() != ".rgb") return preprocess(ppm(bytes, path), rule).rgb;
    const std::size_t wanted = std::size_t{3} * rule.size * rule.size;
    if (bytes.size() != wanted)
        throw Refused(std::to_string(wanted) + " bytes", std::to_string(bytes.size()) + " in " + path, "use the files of this model");
    return {bytes.begin(), bytes.end()};
}

// What a file of floats takes: 3 x size x size.
std::vector<float> by_channels(const std::vector<std::uint8_t>& pixels, const Contract& contract) {
    const std::size_t area = pixels.size() / 3;
    std::vector<float> floats(pixels.size());
    for (std::size_t place = 0; place < area; ++place)
        for (std::size_t channel = 0; channel < 3; ++channel)
            floats[channel * area + place] = (pixels[3 * place + channel] - contract.mean[channel]) / contract.std[channel];
    return floats;
}

// The outputs of these names, one picture at a time: a model may have its batch fixed at 1.
std::vector<Ort::Value> outputs_of(Ort::Session& session, const Contract& contract, std::vector<std::uint8_t>& pixels,
                                   const std::vector<const char*>& names) {
    const std::int64_t size = contract.rule.size, rows[] = {1, size, size, 3}, planes[] = {1, 3, size, size};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto floats = contract.floats ? by_channels(pixels, contract) : std::vector<float>{};
    const auto input = contract.floats ? Ort::Value::CreateTensor<float>(memory, floats.data(), floats.size(), planes, 4)
                                       : Ort::Value::CreateTensor<std::uint8_t>(memory, pixels.data(), pixels.size(), rows, 4);
    const char* in = contract.input.c_str();
    return session.Run(Ort::RunOptions{nullptr}, &in, &input, 1, names.data(), names.size());
}

const float* values_of(const Ort::Value& output, std::size_t count) {
    if (output.GetTensorTypeAndShapeInfo().GetElementCount() != count)
        throw Refused(std::to_string(count) + " values", "another number", "export the model again with bingo-compress");
    return output.GetTensorData<float>();
}

void print_embedding(Ort::Session& session, const Contract& contract, std::vector<std::uint8_t>& pixels, const std::string& path) {
    const auto outputs = outputs_of(session, contract, pixels, {"embedding"});
    const float* values = values_of(outputs[0], contract.dim);
    std::fputs(path.c_str(), stdout);
    for (std::size_t place = 0; place < contract.dim; ++place) std::printf("\t%.9g", static_cast<double>(values[place]));
    std::putchar('\n');
}

void print_class(Ort::Session& session, const Contract& contract, std::vector<std::uint8_t>& pixels, const std::string& path) {
    std::vector<const char*> names{"scores"};
    if (contract.distance) names.push_back("distance");
    const auto outputs = outputs_of(session, contract, pixels, names);
    const float* scores = values_of(outputs[0], contract.classes.size());
    const std::size_t best = std::max_element(scores, scores + contract.classes.size()) - scores;
    const float distance = contract.distance ? *values_of(outputs[1], 1) : 0;
    const bool none = contract.distance && distance > contract.threshold;
    std::printf("%s\t%s\t%.9g", path.c_str(), none ? NONE : contract.classes[best].c_str(), static_cast<double>(scores[best]));
    if (contract.distance) std::printf("\t%.9g", static_cast<double>(distance));
    std::putchar('\n');
}

int run(std::vector<std::string> words) {
    const bool pixels_only = !words.empty() && words[0] == "--pixels", classes = !words.empty() && words[0] == "--classes";
    if (pixels_only || classes) words.erase(words.begin());
    if (words.size() < 2) {
        std::fputs(USAGE, stderr);
        return 2;
    }
    Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "embed");  // its errors come as exceptions too; the log would repeat them
    env.DisableTelemetryEvents();
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    Ort::Session session(env, std::filesystem::path(words[0]).c_str(), options);
    const Contract contract = contract_of(session, words[0]);
    if (classes && contract.classes.empty())
        throw Refused("a file with classes", words[0] + " without", "export with --head linear --labels LABELS");
    if (!classes && !pixels_only && !contract.embedding)
        throw Refused("a file with an output embedding", words[0] + " without", "export with --outputs embedding,features");
    for (std::size_t place = 1; place < words.size(); ++place) {
        auto pixels = pixels_of(words[place], contract.rule);
        if (pixels_only)
            std::fwrite(pixels.data(), 1, pixels.size(), stdout);
        else if (classes)
            print_class(session, contract, pixels, words[place]);
        else
            print_embedding(session, contract, pixels, words[place]);
    }
    return std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run(std::vector<std::string>(words + 1, words + count));
    } catch (const std::exception& error) {  // Refused, or onnxruntime's own
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
