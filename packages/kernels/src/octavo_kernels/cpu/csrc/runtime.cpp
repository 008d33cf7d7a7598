// The few functions that GCC's C++ runtime would supply, in a form without exceptions.
//
// Its own versions can throw, and with the unwinder come symbols of recent glibc versions: a library linked with them on
// a current system would not load on an older one. Out of memory, or past the end of a container, ends the process.
// exports.map keeps all of these inside the library.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__GLIBCXX__)

namespace {

[[noreturn]] void stop(const char* what) {
  std::fputs("octavo_kernels: ", stderr);
  std::fputs(what, stderr);
  std::fputs("\n", stderr);
  std::abort();
}

void* allocate(std::size_t num_bytes, std::size_t alignment) {
  void* memory = nullptr;
  if (num_bytes == 0) num_bytes = 1;
  if (alignment < sizeof(void*)) alignment = sizeof(void*);
  if (posix_memalign(&memory, alignment, num_bytes) != 0) stop("out of memory");
  return memory;
}

constexpr std::size_t DEFAULT_ALIGNMENT = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

void* operator new(std::size_t n) { return allocate(n, DEFAULT_ALIGNMENT); }
void* operator new[](std::size_t n) { return allocate(n, DEFAULT_ALIGNMENT); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return allocate(n, static_cast<std::size_t>(a)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace std {
void __throw_bad_alloc() { stop("out of memory"); }
void __throw_bad_array_new_length() { stop("an array of impossible length"); }
void __throw_length_error(const char* what) { stop(what); }
void __throw_out_of_range(const char* what) { stop(what); }
void __throw_out_of_range_fmt(const char* what, ...) { stop(what); }
void __throw_logic_error(const char* what) { stop(what); }
void __throw_invalid_argument(const char* what) { stop(what); }
void __throw_bad_function_call() { stop("an empty std::function was called"); }
void __throw_system_error(int) { stop("a lock or a thread failed"); }
}  // namespace std

extern "C" void __cxa_pure_virtual() { stop("a pure virtual function was called"); }

#if defined(__linux__)

// Statics in functions, as the Itanium C++ ABI (3.3.3) has them: the guard's first byte says that the object exists. The
// second half of the guard is the lock: 0 free, 1 somebody constructs, 2 and somebody waits.
namespace {
std::atomic<uint8_t>* done(uint64_t* guard) { return reinterpret_cast<std::atomic<uint8_t>*>(guard); }
std::atomic<int>* lock(uint64_t* guard) { return reinterpret_cast<std::atomic<int>*>(guard) + 1; }

void open(uint64_t* guard) {
  if (lock(guard)->exchange(0) == 2) {
    syscall(SYS_futex, lock(guard), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }
}
}  // namespace

extern "C" int __cxa_guard_acquire(uint64_t* guard) {
  for (;;) {
    if (done(guard)->load(std::memory_order_acquire)) return 0;
    int free = 0;
    if (lock(guard)->compare_exchange_strong(free, 1)) {
      if (!done(guard)->load(std::memory_order_acquire)) return 1;
      open(guard);
      return 0;
    }
    int taken = 1;
    if (free == 2 || lock(guard)->compare_exchange_strong(taken, 2) || taken == 2) {
      syscall(SYS_futex, lock(guard), FUTEX_WAIT_PRIVATE, 2, nullptr, nullptr, 0);
    }
  }
}

extern "C" void __cxa_guard_release(uint64_t* guard) {
  done(guard)->store(1, std::memory_order_release);
  open(guard);
}

extern "C" void __cxa_guard_abort(uint64_t* guard) { open(guard); }

#endif
#endif
