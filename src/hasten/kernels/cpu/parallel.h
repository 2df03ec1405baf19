// Work shared among threads: those of the OpenMP runtime that torch has loaded, so that two pools never contend.
#pragma once

#include <cstdint>

namespace hasten {

using Task = void (*)(void *context, std::int64_t task);

// Calls task(context, i) for each i in [0, tasks), each once, on at most `threads` threads; which thread takes which is
// not fixed, so results must depend on the task alone. Returns when all are done.
void run_tasks(std::int64_t tasks, int threads, Task task, void *context);

// The same for a callable: parallel(tasks, threads, [&](std::int64_t i) { ... });
template <class Body>
static inline void parallel(std::int64_t tasks, int threads, const Body &body) {
    run_tasks(
        tasks, threads, [](void *context, std::int64_t i) { (*static_cast<const Body *>(context))(i); },
        const_cast<void *>(static_cast<const void *>(&body)));
}

}  // namespace hasten
