// Work shared among threads: a counter that every thread draws its next piece from.
//
// Runs on torch's OpenMP threads where their runtime was handed over (dsa_set_openmp), so that two pools never spin
// on the same cores, and else on threads of the library that sleep between calls. Safe to call from several threads
// at once.
#pragma once

#include <cstdint>

namespace dsa {

// `work(context, item, worker)`: `item` in [0, items), each once, in any order; `worker` in [0, threads), never the
// same for two items at a time, so that it can name a thread's scratch memory.
using Work = void (*)(void* context, int64_t item, int worker);

void parallel_for(int64_t items, int threads, Work work, void* context);

}  // namespace dsa
