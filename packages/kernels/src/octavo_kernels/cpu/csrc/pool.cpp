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
constexpr int kSpins = 2000;  // some 30 us: a barrier opens soon, unless a thread has lost its core to others

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
  void* memory = nullptr;
  size_t num_bytes = 0;

  void grow(size_t wanted) {
    if (num_bytes >= wanted) return;
    std::free(memory);
    num_bytes = (wanted + 4095) / 4096 * 4096;
    if (posix_memalign(&memory, 4096, num_bytes) != 0) std::abort();
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
    next_task_.store(0, std::memory_order_relaxed);
    if (num_threads_ > 1) {
      // The word says who takes part, so that a worker that is not needed reads nothing else of the job.
      epoch_.store((++num_jobs_ << 8) | static_cast<uint32_t>(num_threads_));
      if (num_idle_.load() > 0) wake_all(epoch_);
    }
    Team team(*this, 0);
    job(team, argument);
    if (num_threads_ > 1) team.barrier();  // nobody reads the job any more
  }

  static void* work(void* start) {
    const Start own = *static_cast<Start*>(start);
    std::free(start);
    Pool& pool = *own.pool;
    uint32_t seen = own.epoch;
    for (;;) {
      wait_for_change(pool.epoch_, seen, kIdleTime, pool.num_idle_);
      seen = pool.epoch_.load(std::memory_order_acquire);
      if (own.index >= static_cast<int>(seen & 0xFF)) continue;
      Team team(pool, own.index);
      pool.job_(team, pool.argument_);
      team.barrier();
    }
    return nullptr;
  }

 private:
  friend class Team;

  struct Start {
    Pool* pool;
    int index;
    uint32_t epoch;
  };

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
    num_arrived_.store(0);
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
  alignas(64) std::atomic<int64_t> next_task_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> barrier_{0};  // counts barriers
  std::atomic<int> num_sleeping_{0};              // threads asleep at the barrier
};

int Team::num_threads() const { return pool_.num_threads_; }

int64_t Team::claim() { return pool_.num_threads_ + pool_.next_task_.fetch_add(1, std::memory_order_relaxed); }

void Team::barrier() {
  if (pool_.num_threads_ == 1) return;
  const uint32_t round = pool_.barrier_.load(std::memory_order_relaxed);
  if (pool_.num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == pool_.num_threads_) {
    pool_.num_arrived_.store(0, std::memory_order_relaxed);
    pool_.next_task_.store(0, std::memory_order_relaxed);
    change(pool_.barrier_, pool_.num_sleeping_);
  } else {
    wait_for_change(pool_.barrier_, round, {}, pool_.num_sleeping_);
  }
}

void* Team::scratch(size_t num_bytes) {
  Scratch& own = pool_.scratch_[index_];
  own.grow(num_bytes);
  return own.memory;
}

void* Team::shared(size_t num_bytes) {
  barrier();  // nobody uses what an earlier call returned
  if (index_ == 0) pool_.shared_.grow(num_bytes);
  barrier();
  return pool_.shared_.memory;
}

void run_on_pool(int num_threads, void (*job)(Team&, const void*), const void* argument) {
  static Pool* pool = new Pool();  // never destroyed: its threads may outlive the exit handlers
  pool->run(num_threads, job, argument);
}

}  // namespace octavo
