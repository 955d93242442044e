// Accesses to the same memory, one of them a write, that nothing orders. What happened before what is followed by
// vector clocks (Mattern 1989) of streams, events and the host: a stream's clock says how many accesses of each stream
// precede its next one. Recording, waiting and synchronizing pass clocks on. Memory is split into cells that are
// accessed alike.

#include "emulated.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace emulated {

namespace {

struct Access {
    std::string name;
    size_t time;
};
struct Cell {
    uintptr_t end;
    int writer = -1;  // the stream that wrote last
    Access write{};
    std::map<int, Access> reads{};  // since then, by stream
};
struct Races {
    bool wanted = atoi(setting("RACES", "0"));
    Clock host;
    std::map<uintptr_t, Cell> cells;  // by their beginning
};

Races &races() {
    static Races &made = *new Races;
    return made;
}

// A cell begins at `at`, if any holds it.
void split(uintptr_t at) {
    auto &cells = races().cells;
    auto after = cells.upper_bound(at);
    if (after == cells.begin()) return;
    auto cell = std::prev(after);
    if (cell->first == at || cell->second.end <= at) return;
    cells.emplace(at, cell->second);
    cell->second.end = at;
}

void report(const Access &first, int stream, const char *second, int other, const char *kind) {
    std::string text = first.name + " on stream " + std::to_string(stream) + " and then " + second + " on stream " +
                       std::to_string(other) + ": " + kind;
    if (!noted("races", text)) fprintf(stderr, "emulated GPU: a race: %s\n", text.c_str());
    note("races", text);
}

}  // namespace

void joined(Clock &later, const Clock &earlier) {
    if (later.size() < earlier.size()) later.resize(earlier.size());
    for (size_t i = 0; i < earlier.size(); i++) later[i] = std::max(later[i], earlier[i]);
}

void host_knows(const Clock &clock) {
    if (races().wanted) joined(races().host, clock);
}

Clock clock_now(const Stream *stream) {
    Clock clock = stream->clock;
    joined(clock, races().host);
    return clock;
}

void access(const char *name, Stream *stream, const void *p, size_t n, bool write) {
    if (!races().wanted || !n || stream->id < 0) return;
    Clock &clock = stream->clock;
    joined(clock, races().host);
    if (clock.size() <= size_t(stream->id)) clock.resize(stream->id + 1);
    size_t time = ++clock[stream->id];
    auto happened_before = [&](int other, const Access &a) {
        return other == stream->id || (size_t(other) < clock.size() && clock[other] >= a.time);
    };

    auto &cells = races().cells;
    uintptr_t at = uintptr_t(p), end = at + n;
    split(at);
    split(end);
    for (auto cell = cells.lower_bound(at); at < end; ++cell) {
        if (cell == cells.end() || cell->first > at) {  // no one has been here
            uintptr_t until = cell == cells.end() ? end : std::min(end, cell->first);
            cell = cells.emplace(at, Cell{until}).first;
        }
        Cell &c = cell->second;
        if (c.writer >= 0 && !happened_before(c.writer, c.write))
            report(c.write, c.writer, name, stream->id, write ? "both write" : "written, read");
        if (write) {
            for (auto &[other, read] : c.reads)
                if (!happened_before(other, read)) report(read, other, name, stream->id, "read, written");
            c.reads.clear();
            c.writer = stream->id;
            c.write = {name, time};
        } else {
            c.reads[stream->id] = {name, time};
        }
        at = c.end;
    }
}

void forget(uintptr_t from, size_t n) {
    auto &cells = races().cells;
    cells.erase(cells.lower_bound(from), cells.lower_bound(from + n));
}

}  // namespace emulated

API void emulated_gpu_access(const char *name, void *stream, const void *p, size_t n, int write) {
    LOCK;
    emulated::access(name, emulated::stream_of(stream), p, n, write);
}
