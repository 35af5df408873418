#include "common/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "dsa/runtime.h"

namespace dsa {
namespace {

struct Job {
    int64_t items;
    int threads;
    Work work;
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    void run() {
        const int worker = workers.fetch_add(1, std::memory_order_relaxed);
        if (worker >= threads) return;
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(context, item, worker);
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

// The library's own threads. One job at a time; a caller that comes while it is busy, from another thread or from
// within a job, works alone.
class Pool {
  public:
    void run(Job& job) {
        if (busy_.exchange(true, std::memory_order_acquire)) return job.run();
        grow(job.threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = job.threads - 1;
        }
        wake_.notify_all();
        job.run();
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wanted_ = 0;  // A thread that has not begun by now need not.
            done_.wait(lock, [this] { return active_ == 0; });
            job_ = nullptr;
        }
        busy_.store(false, std::memory_order_release);
    }

  private:
    // A system that gives no more threads leaves the work to those that there are.
    void grow(int threads) {
        try {
            for (; count_ < threads; ++count_) std::thread([this] { loop(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++active_;
            Job* job = job_;
            lock.unlock();
            job->run();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int count_ = 0, wanted_ = 0, active_ = 0;
};

// Made when the library is loaded, so that no fork can come in the middle of it; never destroyed, because its
// threads may outlive the library's static objects.
std::atomic<Pool*> own_pool{new Pool};

// Threads do not survive a fork: the child begins with none, and leaves the parent's OpenMP threads alone.
void after_fork() {
    own_pool.store(new Pool, std::memory_order_relaxed);
    gomp_parallel.store(nullptr, std::memory_order_relaxed);
}

const bool watches_forks = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, after_fork);
#endif
    return true;
}();

}  // namespace

void parallel_for(int64_t items, int threads, Work work, void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads <= 1) {
        for (int64_t item = 0; item < items; ++item) work(context, item, 0);
        return;
    }
    Job job{items, threads, work, context};
    if (GompParallel parallel = gomp_parallel.load(std::memory_order_relaxed))
        parallel([](void* data) { static_cast<Job*>(data)->run(); }, &job, static_cast<unsigned>(threads), 0);
    else
        own_pool.load(std::memory_order_relaxed)->run(job);
}

}  // namespace dsa

extern "C" void dsa_set_openmp(void* address) {
    dsa::gomp_parallel.store(reinterpret_cast<dsa::GompParallel>(address), std::memory_order_relaxed);
}
