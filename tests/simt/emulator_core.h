// What emulator_hopper.cpp needs of emulator.cpp, and the other way round.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

unsigned thread_number();  // within the block
unsigned thread_count();

// Bounds and hazards of an access by the running thread.
void check(const void* address, size_t bytes, bool write, bool atomic = false);

// Lets the other threads run.
void pause();
// Pauses until some thread has called note_progress(). When none will, the launch fails with `what`.
void wait_for_progress(const std::string& what);
void note_progress();

// emulator_hopper.cpp: a new block starts; __syncthreads has been reached by all.
void start_hopper();
void meet_all_warps();
// The running warp's time, which its arrivals at mbarriers and named barriers advance, and whether it has learned through them
// of what another warp did up to a time of that one's.
uint32_t warp_time();
bool warp_knows(int other, uint32_t time);

}  // namespace simt
