// Pool: the library's threads. A job runs on all of them at once; its parts are handed out by Team::parallel_for.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace octavo {

class Pool;

// One thread's view of a running job. All threads of a job run the same code; work is shared in parallel_for.
class Team {
 public:
  Team(Pool& pool, int index) : pool_(pool), index_(index) {}

  int index() const { return index_; }
  int num_threads() const;

  // Calls body(task) once for each task in 0 .. num_tasks - 1 on whichever thread is free, and returns on all threads
  // when all tasks are done. Every thread must call it with the same number. Bodies of one loop run in any order.
  template <class Body>
  void parallel_for(int64_t num_tasks, Body&& body) {
    if (num_threads() == 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(task);
      return;
    }
    // A thread's first task is its own, which saves it from asking; the others go to whoever is free.
    for (int64_t task = index_; task < num_tasks; task = claim()) body(task);
    barrier();
  }

  // Waits until all threads of the job are here. Between two barriers, one parallel_for at most.
  void barrier();

  // Returns this thread's scratch memory of at least num_bytes, aligned to 64; what was in it may be lost.
  // Valid until the next call by the same thread.
  void* scratch(size_t num_bytes);

  // Returns memory of at least num_bytes that all threads of the job see, aligned to 64; what was in it may be lost.
  // Every thread must call it with the same number. It is a barrier, and valid until the next call.
  void* shared(size_t num_bytes);

 private:
  int64_t claim();

  Pool& pool_;
  int index_;
};

// Runs job(team, argument) on all threads of a pool; returns when all have finished. Calls do not overlap: a second
// caller waits. `num_threads` counts the caller; the pool grows and shrinks to it.
void run_on_pool(int num_threads, void (*job)(Team&, const void*), const void* argument);

}  // namespace octavo
