// Streams are queues. "Early", whatever a stream is given is done at once. "Late", it is done when something asks for
// it: a kernel of the same stream, an event or a stream that is waited for, a synchronization. CUDA allows both, and
// everything in between; a program that is right under both extremes waits where it has to.

#include "emulated.h"

#include <algorithm>
#include <cstring>

namespace emulated {

namespace {

struct Streams {
    std::vector<Stream *> made;
    Stream legacy{0}, per_thread{-1};
    Traffic traffic[4];
    bool late = !strcmp(setting("ORDER", "early"), "late");
    bool skip = atoi(setting("SKIP_COPIES", "0"));
};

Streams &streams() {
    static Streams &made = *new Streams;
    return made;
}

bool is_moved(size_t n) { return !streams().skip || n < (1 << 20); }

void perform(Operation &op) {
    switch (op.kind) {
        case Operation::COPY:
            if (is_moved(op.n)) memmove(op.to, op.staged.empty() ? op.from : op.staged.data(), op.n);
            break;
        case Operation::SET:
            if (is_moved(op.n)) memset(op.to, op.value, op.n);
            break;
        case Operation::WAIT: run_until(op.other, op.position); break;
        case Operation::RECORD:
            if (op.event) op.event->time = now();
            break;
        case Operation::HOST_FUNCTION: op.call(op.to); break;
    }
}

}  // namespace

Stream *stream_of(const void *handle) {
    if (!handle || handle == cudaStreamLegacy) return &streams().legacy;
    if (handle == cudaStreamPerThread) return &streams().per_thread;
    return (Stream *)handle;
}

std::vector<Stream *> all_streams() {
    std::vector<Stream *> all{&streams().legacy, &streams().per_thread};
    all.insert(all.end(), streams().made.begin(), streams().made.end());
    return all;
}

Stream *new_stream(int priority) {
    auto *made = new Stream{int(streams().made.size()) + 1, priority};
    streams().made.push_back(made);
    return made;
}

Traffic &traffic(Way way) { return streams().traffic[way]; }

void run_until(Stream *stream, size_t position) {
    while (stream->done < position && !stream->queue.empty()) {
        Operation op = std::move(stream->queue.front());
        stream->queue.pop_front();
        perform(op);
        stream->done++;
    }
}

void flush(Stream *stream) { run_until(stream, stream->given); }

void flush_all() {
    for (Stream *stream : all_streams()) host_knows(stream->clock);
    for (Stream *stream : all_streams()) flush(stream);
}

void give(Stream *stream, Operation operation) {
    stream->queue.push_back(std::move(operation));
    stream->given++;
    if (!streams().late) flush(stream);
}

cudaError_t copy(const char *call, void *to, const void *from, size_t n, cudaMemcpyKind kind, Stream *stream,
                 bool wait) {
    if (!n) return cudaSuccess;
    if (lost()) return fail(call, cudaErrorIllegalAddress);
    Memory &m = memory();
    bool to_gpu = m.device.has(to), from_gpu = m.device.has(from);
    Way way = Way(2 * from_gpu + to_gpu);
    constexpr cudaMemcpyKind kinds[] = {
        cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice};
    if (kind != cudaMemcpyDefault && kind != kinds[way]) return fail(call, cudaErrorInvalidValue, "direction");
    if ((to_gpu && !m.device.covers(to, n, true)) || (from_gpu && !m.device.covers(from, n, true)))
        return fail(call, cudaErrorInvalidValue, "out of bounds");

    bool to_pinned = !to_gpu && m.host.has(to), from_pinned = !from_gpu && m.host.has(from);
    bool pageable = !(to_gpu || to_pinned) || !(from_gpu || from_pinned);
    bool waits = wait || (way == GPU_TO_HOST && pageable);
    traffic(way).bytes += n;
    traffic(way).copies++;
    stream->copies++;
    if (way == HOST_TO_GPU && pageable) count("pageable copies to the GPU");
    if (way == GPU_TO_HOST && pageable) count("pageable copies from the GPU");
    // One copy may not go beyond the registration it begins in.
    if ((from_pinned && !m.host.covers(from, n, false)) || (to_pinned && !m.host.covers(to, n, false)))
        note("copies", "a copy crosses pinned ranges");
    // Pageable memory is read or written before the call returns: no stream can race for it.
    if (from_gpu || from_pinned) access(call, stream, from, n, false);
    if (to_gpu || to_pinned) access(call, stream, to, n, true);

    Operation op{Operation::COPY, (char *)to, (const char *)from, n};
    if (way == HOST_TO_GPU && pageable) {
        flush(stream);  // the driver waits for the stream; then the source is free at once
        if (streams().late && !streams().skip) op.staged.assign(op.from, op.from + n);
    }
    give(stream, std::move(op));
    if (waits || way == HOST_TO_HOST) flush(stream);
    if (waits) {
        count("host waits for a copy");
        host_knows(stream->clock);
    }
    return cudaSuccess;
}

cudaError_t set(const char *call, void *p, int value, size_t n, Stream *stream, bool wait) {
    if (!n) return cudaSuccess;
    if (lost()) return fail(call, cudaErrorIllegalAddress);
    if (!memory().device.covers(p, n, true) && !memory().host.covers(p, n, false))
        return fail(call, cudaErrorInvalidValue, "out of bounds");
    count("memsets");
    access(call, stream, p, n, true);
    Operation op{Operation::SET, (char *)p, nullptr, n, value};
    give(stream, std::move(op));
    if (wait) flush(stream);
    return cudaSuccess;
}

void note_unfinished(const char *call, const void *p, size_t n) {
    auto overlaps = [&](const char *q, size_t m) { return q < (const char *)p + n && (const char *)p < q + m; };
    for (Stream *stream : all_streams())
        for (const Operation &op : stream->queue)
            if (op.kind == Operation::COPY && (overlaps(op.to, op.n) || (op.staged.empty() && overlaps(op.from, op.n))))
                note("copies under way", call);
}

void record(Event *event, Stream *stream) {
    forget(event);
    event->stream = stream;
    event->polls = 0;
    event->position = stream->given + 1;
    event->clock = clock_now(stream);
    Operation op{Operation::RECORD};
    op.event = event;
    give(stream, std::move(op));
}

void wait(Stream *stream, Event *event) {
    if (!event->stream) return;
    joined(stream->clock, event->clock);
    Operation op{Operation::WAIT};
    op.other = event->stream;
    op.position = event->position;
    give(stream, std::move(op));
}

void forget(Event *event) {
    if (!event->stream) return;
    for (Operation &op : event->stream->queue)
        if (op.kind == Operation::RECORD && op.event == event) op.event = nullptr;
}

bool poll(Event *event) {
    bool done = !event->stream || event->stream->done >= event->position;
    if (!done && ++event->polls > 3) {  // time passes while one polls
        run_until(event->stream, event->position);
        done = true;
    }
    if (done) host_knows(event->clock);
    return done;
}

}  // namespace emulated
