#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// glibc 2.34 gave pthread_create a new version. The old one does the same and is found on older systems too.
#if defined(__linux__) && defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pthread_create,pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_detach,pthread_detach@GLIBC_2.2.5");
#elif defined(__linux__) && defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pthread_create,pthread_create@GLIBC_2.17");
__asm__(".symver pthread_detach,pthread_detach@GLIBC_2.17");
#endif

namespace octavo {
namespace {

constexpr int kMaxThreads = 255;
constexpr int kSpins = 2000;  // some 30 us: a loop's last tasks end soon, unless a thread has lost its core to others

// For so long a worker waits for the next job before it sleeps, since waking it takes 40 us and more. The next step of a
// model mostly comes within that time, and whoever else wants the core meanwhile gets it.
constexpr std::chrono::microseconds kIdleTime(300);
constexpr int kSpinsPerOffer = 50;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)word, (void)value;
  usleep(20);
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 0x7FFFFFFF, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

bool spin(const std::atomic<uint32_t>& word, uint32_t value, int num_spins) {
  for (int i = 0; i < num_spins; ++i) {
    if (word.load(std::memory_order_acquire) != value) return true;
    relax();
  }
  return false;
}

// Waits until `word` differs from `value`: spins for a while, offers its core to others for `patience`, then sleeps.
// `num_sleepers` tells who changes the word whether anybody must be woken.
void wait_for_change(std::atomic<uint32_t>& word, uint32_t value, std::chrono::microseconds patience,
                     std::atomic<int>& num_sleepers) {
  if (spin(word, value, kSpins)) return;
  if (patience.count() > 0) {
    const auto end = std::chrono::steady_clock::now() + patience;
    do {
      sched_yield();
      if (spin(word, value, kSpinsPerOffer)) return;
    } while (std::chrono::steady_clock::now() < end);
  }
  num_sleepers.fetch_add(1);
  while (word.load() == value) sleep_while(word, value);
  num_sleepers.fetch_sub(1);
}

void change(std::atomic<uint32_t>& word, std::atomic<int>& num_sleepers) {
  word.fetch_add(1);
  if (num_sleepers.load() > 0) wake_all(word);
}

struct Scratch {
  std::atomic<void*> memory{nullptr};  // a thread that comes late may read it while another makes it grow
  size_t num_bytes = 0;

  void grow(size_t wanted) {
    if (num_bytes >= wanted) return;
    std::free(memory.load(std::memory_order_relaxed));
    num_bytes = (wanted + 4095) / 4096 * 4096;
    void* grown = nullptr;
    if (posix_memalign(&grown, 4096, num_bytes) != 0) std::abort();
    memory.store(grown, std::memory_order_relaxed);
  }
};

}  // namespace

class Pool {
 public:
  void run(int num_threads, void (*job)(Team&, const void*), const void* argument) {
    forget_threads_of_parent();
    std::lock_guard<std::mutex> one_at_a_time(running_);
    num_threads = num_threads < 1 ? 1 : (num_threads > kMaxThreads ? kMaxThreads : num_threads);
    while (num_started_ < num_threads - 1 && start_worker()) {
    }
    num_threads_ = num_threads < num_started_ + 1 ? num_threads : num_started_ + 1;
    job_ = job;
    argument_ = argument;
    taken_.store(uint64_t{1} << Team::kLoopAt);
    num_done_.store(0);
    closed_.store(1);
    if (num_threads_ > 1) {
      open_.store(kOpen);
      // The word says who takes part, so that a worker that is not needed reads nothing else of the job.
      epoch_.store((++num_jobs_ << 8) | static_cast<uint32_t>(num_threads_));
      if (num_idle_.load() > 0) wake_all(epoch_);
    }
    Team team(*this, 0);
    job(team, argument);
    if (num_threads_ > 1) wait_until_left();
  }

  static void* work(void* start) {
    const Start own = *static_cast<Start*>(start);
    std::free(start);
    Pool& pool = *own.pool;
    uint32_t seen = own.epoch;
    for (;;) {
      wait_for_change(pool.epoch_, seen, kIdleTime, pool.num_idle_);
      seen = pool.epoch_.load(std::memory_order_acquire);
      if (own.index >= static_cast<int>(seen & 0xFF) || !pool.enter()) continue;
      Team team(pool, own.index);
      pool.job_(team, pool.argument_);
      pool.leave();
    }
    return nullptr;
  }

 private:
  friend class Team;

  static constexpr uint32_t kOpen = 1u << 31;

  struct Start {
    Pool* pool;
    int index;
    uint32_t epoch;
  };

  // A worker takes part in a job only if it comes before the caller is through; the caller waits for those who did. One
  // that comes late may enter a later job than the one that woke it, also a job for fewer threads: it helps there.
  bool enter() {
    uint32_t inside = open_.load(std::memory_order_acquire);
    while ((inside & kOpen) != 0) {
      if (open_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void leave() {
    if (open_.fetch_sub(1) == 1 && num_sleeping_.load() > 0) wake_all(open_);
  }

  void wait_until_left() {
    uint32_t inside = open_.fetch_and(~kOpen) & ~kOpen;
    while (inside != 0) {
      wait_for_change(open_, inside, {}, num_sleeping_);
      inside = open_.load(std::memory_order_acquire);
    }
  }

  bool start_worker() {
    auto* start = static_cast<Start*>(std::malloc(sizeof(Start)));
    if (start == nullptr) return false;
    *start = Start{this, num_started_ + 1, epoch_.load()};
    pthread_t thread;
    if (pthread_create(&thread, nullptr, &Pool::work, start) != 0) {
      std::free(start);
      return false;
    }
    pthread_detach(thread);
    ++num_started_;
    return true;
  }

  void forget_threads_of_parent() {  // a child of fork() has the memory of the pool but none of its threads
    const pid_t process = getpid();
    if (process == process_) return;
    process_ = process;
    new (&running_) std::mutex();  // the parent may have held it
    num_started_ = 0;
    num_idle_.store(0);
    num_sleeping_.store(0);
    open_.store(0);
  }

  std::mutex running_;
  pid_t process_ = -1;
  int num_started_ = 0;  // threads beside the caller
  int num_threads_ = 1;  // of the present job, the caller counted
  void (*job_)(Team&, const void*) = nullptr;
  const void* argument_ = nullptr;
  Scratch scratch_[kMaxThreads];
  Scratch shared_;
  uint32_t num_jobs_ = 0;
  alignas(64) std::atomic<uint32_t> epoch_{0};  // number of the job, and in the low 8 bits its threads
  std::atomic<int> num_idle_{0};                // workers asleep between jobs
  alignas(64) std::atomic<uint32_t> open_{0};        // kOpen while workers may take part, plus how many do
  alignas(64) std::atomic<uint64_t> taken_{0};       // low bits of the loop's number, tasks taken from its two ends
  alignas(64) std::atomic<uint64_t> num_done_{0};    // tasks that were ended in this job
  alignas(64) std::atomic<uint32_t> closed_{0};      // number of the loop whose tasks are not all done
  std::atomic<int> num_sleeping_{0};                 // threads asleep until a loop or a job ends
};

int Team::num_threads() const { return pool_.num_threads_; }

void Team::begin_loop(int64_t num_tasks) {
  taken_ = uint64_t{++loop_} << kLoopAt;
  num_tasks_ = static_cast<uint32_t>(num_tasks);
  num_due_ += num_tasks_;
}

int64_t Team::claim() {
  // The first attempt is on a guess, that nobody has claimed since: to ask before would be another cache miss.
  while (taken_ >> kLoopAt == (loop_ & 0xFFFF)) {
    const uint64_t first = taken_ & kMaxTasks, last = taken_ >> kCountBits & kMaxTasks;
    if (first + last >= num_tasks_) return -1;
    const bool from_last = begins_last();
    const uint64_t claimed = taken_ + (from_last ? uint64_t{1} << kCountBits : 1);
    if (!pool_.taken_.compare_exchange_strong(taken_, claimed, std::memory_order_acq_rel)) continue;
    taken_ = claimed;
    return static_cast<int64_t>(from_last ? num_tasks_ - 1 - last : first);
  }
  return -1;
}

void Team::end_loop(uint64_t num_done) {
  if (num_done > 0 && pool_.num_done_.fetch_add(num_done, std::memory_order_acq_rel) + num_done == num_due_) {
    pool_.taken_.store((uint64_t{loop_} + 1) << kLoopAt, std::memory_order_release);
    change(pool_.closed_, pool_.num_sleeping_);
    return;
  }
  uint32_t open = pool_.closed_.load(std::memory_order_acquire);
  while (open == loop_) {
    wait_for_change(pool_.closed_, open, {}, pool_.num_sleeping_);
    open = pool_.closed_.load(std::memory_order_acquire);
  }
}

void* Team::scratch(size_t num_bytes) {
  Scratch& own = pool_.scratch_[index_];
  own.grow(num_bytes);
  return own.memory.load(std::memory_order_relaxed);
}

void* Team::shared(size_t num_bytes) {
  parallel_for(1, [&](int64_t) { pool_.shared_.grow(num_bytes); });  // no earlier task uses the memory any more
  return pool_.shared_.memory.load(std::memory_order_relaxed);
}

void run_on_pool(int num_threads, void (*job)(Team&, const void*), const void* argument) {
  static Pool* pool = new Pool();  // never destroyed: its threads may outlive the exit handlers
  pool->run(num_threads, job, argument);
}

}  // namespace octavo
