#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace hasten {

namespace {

struct Share {
    std::atomic<std::int64_t> next{0};
    std::int64_t tasks = 0;
    Task task = nullptr;
    void *context = nullptr;
};

void work(void *argument) {
    Share &share = *static_cast<Share *>(argument);
    for (;;) {
        const std::int64_t i = share.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= share.tasks) return;
        share.task(share.context, i);
    }
}

// GOMP_parallel is the entry that compiled OpenMP code calls; every common runtime offers it. torch loads its own
// runtime for all to see, under a name that differs between builds, so it is looked up and not linked.
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

Parallel runtime() {
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

}  // namespace

void run_tasks(std::int64_t tasks, int threads, Task task, void *context) {
    Share share;
    share.tasks = tasks;
    share.task = task;
    share.context = context;
    const std::int64_t wanted = tasks < threads ? tasks : threads;
    if (wanted <= 1) {
        work(&share);
    } else if (runtime() != nullptr) {
        runtime()(work, &share, static_cast<unsigned>(wanted), 0);
    } else {
        std::vector<std::thread> others;
        for (std::int64_t i = 1; i < wanted; ++i) others.emplace_back(work, &share);
        work(&share);
        for (std::thread &other : others) other.join();
    }
}

}  // namespace hasten
