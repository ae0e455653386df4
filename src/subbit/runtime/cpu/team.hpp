// Running a function on several threads at once.
#pragma once

namespace subbit {

// Call `work(data)` on `threads` threads at once, the calling one included, and return when all are done. Fewer may
// come, so the callers share the work out among those that do.
void on_team(int threads, void (*work)(void*), void* data);

// Use this OpenMP runtime's GOMP_parallel, that of torch: its threads then do torch's work and ours, instead of two
// teams taking the processors from each other. Without it, threads are started and joined for every call.
void use_gomp_parallel(void* function);

}  // namespace subbit
