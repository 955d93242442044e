// What a program did to the GPU: calls, refusals, traffic, launches and notes, as JSON. Written to EMULATED_GPU_LOG
// when the program ends, and given to whoever asks.

#include "emulated.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

namespace {

using Counts = std::map<std::string, size_t>;

struct Log {
    bool used = false;
    bool verbose = atoi(setting("VERBOSE", "0"));
    double begun = now();
    Counts calls, errors;
    std::map<std::string, Counts> notes;
};

Log &the_log() {
    static Log &made = *new Log;
    return made;
}

thread_local cudaError_t last = cudaSuccess;

void failed(const char *call, int code, const std::string &why) {
    LOCK;
    the_log().errors[std::string(call) + ": " + std::to_string(code) + (why.empty() ? "" : " " + why)]++;
    if (the_log().verbose) fprintf(stderr, "emulated GPU: %s -> %d %s\n", call, code, why.c_str());
}

std::string quoted(const std::string &text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if ((unsigned char)c >= 32) out += c;
    }
    return out + "\"";
}
std::string json(size_t number) { return std::to_string(number); }
std::string json(double number) { return std::to_string(number); }
std::string json(const char *text) { return quoted(text); }
template <class Value>
std::string json(const std::map<std::string, Value> &object) {
    std::string out = "{";
    for (auto &[key, value] : object) out += (out.size() > 1 ? ", " : "") + quoted(key) + ": " + json(value);
    return out + "}";
}

std::string report() {
    const Memory &m = memory();
    Counts kernels = launches_by_name(), streams, bytes, copies;
    size_t launches = 0;
    for (auto &[name, n] : kernels) launches += n;
    for (Stream *stream : all_streams()) {
        std::string name = "stream " + std::to_string(stream->id);
        if (stream->launches) streams[name + " launches"] = stream->launches;
        if (stream->copies) streams[name + " copies"] = stream->copies;
    }
    constexpr const char *ways[] = {"host to host", "host to GPU", "GPU to host", "on the GPU"};
    for (Way way : {HOST_TO_HOST, HOST_TO_GPU, GPU_TO_HOST, ON_GPU}) {
        bytes[ways[way]] = traffic(way).bytes;
        copies[ways[way]] = traffic(way).copies;
    }
    Counts in_memory{{"total", m.total}, {"context", m.context}, {"taken", m.taken}, {"peak", m.peak},
                     {"mallocs", m.mallocs}, {"frees", m.frees}, {"pinned", m.pinned}, {"pinned peak", m.pinned_peak}};
    std::string out = "{\"gpu\": " + json(gpu().key) + ", \"seconds\": " + json(now() - the_log().begun) +
                      ", \"launches\": " + json(launches);
    auto add = [&](const char *key, const std::string &value) { out += std::string(",\n \"") + key + "\": " + value; };
    add("streams", json(streams));
    add("bytes", json(bytes));
    add("copies", json(copies));
    add("memory", json(in_memory));
    add("calls", json(the_log().calls));
    add("errors", json(the_log().errors));
    add("notes", json(the_log().notes));
    add("kernels", json(kernels));
    return out + "}";
}

void write_report(std::string path) {
    if (size_t at = path.find("%p"); at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
    FILE *file = fopen(path.c_str(), "w");
    if (!file) return;
    fprintf(file, "%s\n", report().c_str());
    fclose(file);
}

struct AtExit {
    ~AtExit() {
        if (!is_used()) return;
        LOCK;
        if (std::string path = setting("LOG", ""); !path.empty()) write_report(path);
        const Counts &races = the_log().notes["races"];
        if (races.empty()) return;
        // Again, since whoever captures output, like pytest, may have hidden them; and so that no one overlooks them.
        for (auto &[race, times] : races) fprintf(stderr, "emulated GPU: %zu times a race: %s\n", times, race.c_str());
        fprintf(stderr, "emulated GPU: the exit code is 3 because of races\n");
        fflush(nullptr);
        _exit(3);
    }
} at_exit;

}  // namespace

std::recursive_mutex &mutex() {
    static std::recursive_mutex &made = *new std::recursive_mutex;
    return made;
}

const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv((std::string("EMULATED_GPU_") + name).c_str());
    return value && *value ? value : otherwise;
}

size_t setting_mib(const char *name, size_t otherwise) {
    const char *value = setting(name, "");
    return *value ? strtoull(value, nullptr, 10) << 20 : otherwise;
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void used() { the_log().used = true; }
bool is_used() { return the_log().used; }
void count(const std::string &call, size_t n) { the_log().calls[call] += n; }
bool noted(const char *topic, const std::string &text) { return the_log().notes[topic].count(text); }
void note(const char *topic, const std::string &text) {
    the_log().notes[topic][text]++;
    if (the_log().verbose) fprintf(stderr, "emulated GPU: %s: %s\n", topic, text.c_str());
}

cudaError_t fail(const char *call, cudaError_t code, const std::string &why) {
    failed(call, code, why);
    return last = code;
}
CUresult refuse(const char *call, CUresult code, const std::string &why) {
    failed(call, code, why);
    return code;
}
cudaError_t last_error() { return last; }
cudaError_t take_last_error() {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

}  // namespace emulated

API const char *emulated_gpu_report() {
    static thread_local std::string text;
    LOCK;
    text = emulated::report();
    return text.c_str();
}

API void emulated_gpu_reset() {
    using namespace emulated;
    LOCK;
    reset_launches();
    for (Way way : {HOST_TO_HOST, HOST_TO_GPU, GPU_TO_HOST, ON_GPU}) traffic(way) = {};
    the_log().calls.clear();
    the_log().errors.clear();
    the_log().notes.clear();
    Memory &m = memory();
    m.peak = m.taken;
    m.pinned_peak = m.pinned;
    m.mallocs = m.frees = 0;
}

// Every function that nothing here implements. It says no, and the report says who asked.
API int emulated_gpu_stub(const char *name, int code) {
    if (strstr(name, "cuda")) return emulated::fail(name, cudaError_t(code), "not emulated");
    return emulated::refuse(name, CUresult(code), "not emulated");
}
