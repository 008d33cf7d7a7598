// Pool: the library's threads. A job runs on all of them at once; its parts are handed out by Team::parallel_for.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace octavo {

class Pool;

// One thread's view of a running job. All threads of a job run the same code; work is shared in parallel_for.
//
// No thread waits for another as such, only for tasks that were begun: one that has lost its core holds nobody up but for
// the task that it lost it in. When it comes back it passes by the loops that others have ended meanwhile, at a time when
// later ones overwrite what those read. So the code between loops may compute what tasks of the next loop need, in the
// thread's own memory, and nothing else: if it came late, what it computes is wrong and no task is left that uses it.
class Team {
 public:
  Team(Pool& pool, int index) : pool_(pool), index_(index) {}

  int num_threads() const;

  // Calls body(task) once for each task in 0 .. num_tasks - 1 on whichever thread is free, and returns when all tasks are
  // done. Every thread must call it with the same number. Bodies of one loop run in any order: threads begin at the first
  // task or at the last one, each always at the same end, so that with two threads a task that a loop has again and again
  // mostly finds in the caches what the same thread left there.
  template <class Body>
  void parallel_for(int64_t num_tasks, Body&& body) {
    if (num_threads() == 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(task);
      return;
    }
    for (int64_t first = 0; first < num_tasks; first += kMaxTasks) {
      begin_loop(num_tasks - first < kMaxTasks ? num_tasks - first : kMaxTasks);
      uint64_t num_done = 0;
      for (int64_t task = claim(); task >= 0; task = claim(), ++num_done) body(first + task);
      end_loop(num_done);
    }
  }

  // The task of this loop that this thread gets after `task` if all threads are equally fast; beyond its ends if none is
  // left. In a body.
  int64_t task_after(int64_t task) const {
    const int64_t at_this_end = (num_threads() + (begins_last() ? 0 : 1)) / 2;
    return begins_last() ? task - at_this_end : task + at_this_end;
  }

  // The task of a loop of so many that this thread probably gets first; it may not exist. Before the loop.
  int64_t first_task(int64_t num_tasks) const {
    return begins_last() ? num_tasks - 1 - index_ / 2 : index_ / 2;
  }

  // Returns this thread's scratch memory of at least num_bytes, aligned to 64; what was in it may be lost.
  // Valid until the next call by the same thread.
  void* scratch(size_t num_bytes);

  // Returns memory of at least num_bytes that the tasks of all threads see, aligned to 64; what was in it may be lost.
  // Every thread must call it with the same number. Valid until the next call.
  void* shared(size_t num_bytes);

 private:
  static constexpr int kCountBits = 24, kLoopAt = 2 * kCountBits;  // of what has been taken of a loop
  static constexpr int64_t kMaxTasks = (int64_t{1} << kCountBits) - 1;  // of a loop of threads

  bool begins_last() const { return index_ % 2 == 1; }
  void begin_loop(int64_t num_tasks);
  int64_t claim();  // a task of this loop, or -1 if none is left
  void end_loop(uint64_t num_done);

  friend class Pool;

  Pool& pool_;
  int index_;
  uint32_t loop_ = 0;       // loops begun in this job; the same on all threads at the same place of the code
  uint64_t taken_ = 0;      // Pool::taken_ when last seen
  uint32_t num_tasks_ = 0;  // of the present loop
  uint64_t num_due_ = 0;    // tasks of all loops so far
};

// Runs job(team, argument) on all threads of a pool; returns when all have finished. Calls do not overlap: a second
// caller waits. `num_threads` counts the caller; the pool grows and shrinks to it.
void run_on_pool(int num_threads, void (*job)(Team&, const void*), const void* argument);

}  // namespace octavo
