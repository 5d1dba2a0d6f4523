// team.h: the threads that kernels.cpp, attention.cpp and sampling.cpp share their work among.
//
// The one idea: nobody waits for a thread that has not begun. The caller shares out ranges of the work, and whoever
// is done with its own takes what is left of the others', piece by piece. So a thread that another process keeps from
// its core costs nothing but its help. One that is stopped in the middle of a piece does make the caller wait. That
// tells that the cores are taken, and fewer threads are asked for a while. OpenMP's threads would wait for each other
// after every operation, spinning: with another busy process a step took five times as long.
//
// How many threads there are at most is PyTorch's number, which OMP_NUM_THREADS sets. Results must not depend on it:
// a piece of work is the same whoever does it.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>

#include <sys/resource.h>
#include <time.h>

#include <ATen/Config.h>

namespace at {
int get_num_threads();  // of ATen/Parallel.h, which takes long to read
}

namespace team {

using std::int64_t, std::uint32_t, std::uint64_t;
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Waking a helper that sleeps takes far longer than a piece of work. So it stays awake for as long as Python takes from
// one step to the next.
constexpr microseconds AWAKE(1000);
// Who makes the caller wait for so long, and twice as long as it worked itself, which is more than any piece takes, has
// lost its core.
constexpr microseconds STALL(200);
constexpr uint32_t JOBS = 64;  // after so many, the system is asked if the caller has lost its own
constexpr int LOST = 8;        // for one in so many parts of the time
// For how long fewer helpers are asked after a stall: twice as long as the last time, if it came soon after asking for
// more. A quiet machine has a stall now and then, too.
constexpr microseconds SHORTEST(4000), LONGEST(256000), SOON(20000);
constexpr int64_t PIECES = 4;  // of each thread's range

// While it exists, PyTorch's operators use one thread. Its other threads would wait for the next operator in a loop, and
// take the cores from the team, which goes on with as many threads as PyTorch has otherwise.
#if AT_PARALLEL_OPENMP
extern "C" void omp_set_num_threads(int);
struct PyTorchAlone {
  inline static thread_local int team_threads = 0;  // 0: as many as PyTorch
  const int before = std::exchange(team_threads, at::get_num_threads());
  PyTorchAlone() { omp_set_num_threads(1); }
  ~PyTorchAlone() { omp_set_num_threads(std::exchange(team_threads, before)); }
};
inline int threads_now() { return PyTorchAlone::team_threads ? PyTorchAlone::team_threads : at::get_num_threads(); }
#else
struct PyTorchAlone {};
inline int threads_now() { return at::get_num_threads(); }
#endif

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until `ready`, or until the time is over -> is it ready?
template <class Ready>
bool spin(microseconds time, Ready ready) {
  for (int i = 0; i < 64; i++) {
    if (ready()) return true;
    pause();
  }
  for (const auto end = Clock::now() + time; Clock::now() < end;)
    for (int i = 0; i < 64; i++) {
      if (ready()) return true;
      pause();
    }
  return false;
}

// What is left of the range of a thread. The number of the job is in the same word as the next index: who is late for
// a job cannot take anything of the one after it.
struct alignas(64) Range {
  std::atomic<uint64_t> next{0};  // job, index
  std::atomic<uint32_t> end{0};
};

struct alignas(64) Bell {
  std::atomic<uint32_t> job{0};  // the latest that a helper was asked for
};

class Team {
 public:
  // body(i) for i = 0 .. count - 1, each once, in any order and by any thread.
  template <class Body>
  void run(int64_t count, const Body& body) {
    const int64_t most = std::min<int64_t>(threads_now(), count) - 1;
    if (most <= 0 || busy.test_and_set(std::memory_order_acquire)) {  // several threads may call operators
      for (int64_t i = 0; i < count; i++) body(i);
      return;
    }
    call([](const void* body, uint32_t i) { (*(const Body*)body)(i); }, &body, count, helpers_now(most));
    const std::exception_ptr thrown = std::exchange(failure, nullptr);
    failed.clear();
    busy.clear(std::memory_order_release);
    if (thrown) std::rethrow_exception(thrown);
  }

 private:
  using Function = void (*)(const void*, uint32_t);
  static constexpr int MOST = 256;

  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  Range ranges[MOST];
  Bell bells[MOST];
  int hired = 0;  // helpers that exist: 1, 2, ...; number 0 is the caller
  uint32_t job = 0;
  // Of the job, for helpers. They may read them late, but then find nothing to take.
  std::atomic<Function> function{nullptr};
  std::atomic<const void*> body{nullptr};
  std::atomic<uint32_t> threads{1}, piece{1};
  alignas(64) std::atomic<uint32_t> done{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr failure;  // the first that a body threw
  int64_t allowed = MOST;  // helpers that may be asked for
  microseconds patience = SHORTEST;
  Clock::time_point retry{}, grown{};  // when to ask for more of them, and when that was done

  // How many helpers to ask for: after a stall half as many, for longer and longer if it happens again.
  int64_t helpers_now(int64_t most) {
    most = std::min<int64_t>(most, MOST - 1);
    if (allowed < most) {
      const auto now = Clock::now();
      if (now >= retry) allowed = 2 * allowed + 1, retry = now + patience, grown = now;
    }
    return std::min(allowed, most);
  }

  // Was the caller taken from its core, for a good part of the time since it was last asked? Every machine has something
  // short to do now and then.
  bool was_interrupted() {
#if defined(RUSAGE_THREAD)
    static thread_local long interruptions = 0;
    static thread_local Clock::duration worked_before{};
    static thread_local Clock::time_point before{};
    rusage usage;
    timespec worked;
    if (job % JOBS || getrusage(RUSAGE_THREAD, &usage) || clock_gettime(CLOCK_THREAD_CPUTIME_ID, &worked)) return false;
    const Clock::time_point now = Clock::now();
    const Clock::duration now_worked = std::chrono::seconds(worked.tv_sec) + std::chrono::nanoseconds(worked.tv_nsec);
    const bool first = before == Clock::time_point{};
    const auto passed = now - std::exchange(before, now);
    const auto lost = passed - (now_worked - std::exchange(worked_before, now_worked));
    return usage.ru_nivcsw != std::exchange(interruptions, usage.ru_nivcsw) && lost > passed / LOST && !first;
#else
    return false;
#endif
  }

  void stalled() {
    const auto now = Clock::now();
    patience = now - grown > SOON ? SHORTEST : std::min(2 * patience, LONGEST);
    allowed = std::min<int64_t>(allowed, threads_now() - 1) / 2, retry = now + patience;
  }

  void call(Function call_function, const void* call_body, uint32_t count, int64_t helpers) {
    const uint32_t n = helpers + 1;
    job++;
    function.store(call_function, std::memory_order_relaxed), body.store(call_body, std::memory_order_relaxed);
    threads.store(n, std::memory_order_relaxed), done.store(0, std::memory_order_relaxed);
    piece.store(std::max<uint32_t>(1, count / (n * PIECES)), std::memory_order_relaxed);
    for (uint32_t t = 0; t < n; t++) {
      ranges[t].next.store((uint64_t)job << 32 | UINT32_MAX, std::memory_order_relaxed);  // before the new end is there
      ranges[t].end.store((uint64_t)count * (t + 1) / n, std::memory_order_release);
      ranges[t].next.store((uint64_t)job << 32 | (uint64_t)count * t / n, std::memory_order_release);
    }
    hire(helpers);
    for (int64_t t = 1; t <= std::min<int64_t>(helpers, hired); t++) {
      bells[t].job.store(job, std::memory_order_release);
      bells[t].job.notify_one();
    }
    const auto begin = Clock::now();
    work(0, job);
    const auto own = std::chrono::duration_cast<microseconds>(Clock::now() - begin);
    const bool stall = !spin(std::max(STALL, 2 * own), [&] { return done.load(std::memory_order_acquire) == count; });
    while (done.load(std::memory_order_acquire) != count) std::this_thread::yield();
    if (was_interrupted() || stall) stalled();
  }

  void hire(int64_t helpers) {
    try {
      for (; hired < helpers; hired++) std::thread(&Team::help, this, hired + 1).detach();
    } catch (const std::system_error&) {  // the system allows no more: the others do their part
    }
  }

  void run_piece(Function f, const void* of, uint32_t begin, uint32_t end) {
    try {
      for (uint32_t i = begin; i < end; i++) f(of, i);
    } catch (...) {  // the caller throws it when nobody uses the body any more
      if (!failed.test_and_set()) failure = std::current_exception();
    }
    done.fetch_add(end - begin, std::memory_order_release);
  }

  // Thread t takes pieces of a job, of its own range first, until there are none.
  void work(uint32_t t, uint32_t job) {
    const uint32_t n = threads.load(std::memory_order_relaxed);
    for (uint32_t k = 0; k < n; k++) {
      Range& range = ranges[(t + k) % n];
      uint64_t next = range.next.load(std::memory_order_acquire);
      while (next >> 32 == job) {
        const Function f = function.load(std::memory_order_relaxed);
        const void* of = body.load(std::memory_order_relaxed);
        const uint32_t begin = next, limit = range.end.load(std::memory_order_acquire);
        const uint32_t end = std::min(begin + piece.load(std::memory_order_relaxed), limit);
        if (begin >= limit) break;
        // If this succeeds, the job is not done, and what was read above belongs to it.
        if (!range.next.compare_exchange_weak(next, (uint64_t)job << 32 | end, std::memory_order_acq_rel)) continue;
        run_piece(f, of, begin, end);
        next = range.next.load(std::memory_order_acquire);
      }
    }
  }

  void help(uint32_t t) {
    for (uint32_t seen = 0;;) {
      auto& bell = bells[t].job;
      if (!spin(AWAKE, [&] { return bell.load(std::memory_order_acquire) != seen; })) bell.wait(seen);
      seen = bell.load(std::memory_order_acquire);
      work(t, seen);
    }
  }
};

inline Team& team() {
  static Team* all = new Team;  // never deleted: its threads are still there when the process ends
  return *all;
}

// body(i) for i = 0 .. count - 1, side by side if that pays: `work` counts multiplications or numbers.
constexpr int64_t SMALL = 1 << 15;  // for less, sharing the work would take longer
template <class Body>
void side_by_side(int64_t count, int64_t work, const Body& body) {
  if (work > SMALL && count > 1) return team().run(count, body);
  for (int64_t i = 0; i < count; i++) body(i);
}

}  // namespace team

using team::side_by_side;
