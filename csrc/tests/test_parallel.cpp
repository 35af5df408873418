// Work shared among threads, on the library's own: every item once, no worker twice at a time, from any caller.
#include "common/parallel.h"

#include <atomic>
#include <thread>
#include <vector>
#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "check.h"

namespace {

constexpr int kThreads = 4;

struct Counts {
    explicit Counts(int64_t items) : done(static_cast<size_t>(items)) {}
    std::vector<std::atomic<int>> done;
    std::atomic<bool> at_work[kThreads] = {};
    std::atomic<int> clashes{0};
    int nested = 0;
};

void count(void* context, int64_t item, int worker) {
    auto& counts = *static_cast<Counts*>(context);
    if (worker < 0 || worker >= kThreads || counts.at_work[worker].exchange(true)) counts.clashes.fetch_add(1);
    if (counts.nested) {
        Counts inner(counts.nested);
        dsa::parallel_for(counts.nested, kThreads, count, &inner);
        for (auto& done : inner.done)
            if (done != 1) counts.clashes.fetch_add(1);
    }
    counts.done[static_cast<size_t>(item)].fetch_add(1);
    counts.at_work[worker].store(false);
}

bool each_once(int64_t items, int threads, int nested = 0) {
    Counts counts(items);
    counts.nested = nested;
    dsa::parallel_for(items, threads, count, &counts);
    for (auto& done : counts.done)
        if (done != 1) return false;
    return counts.clashes == 0;
}

}  // namespace

int main() {
    for (int64_t items : {0, 1, 2, 3, 4, 5, 1000})
        for (int threads : {0, 1, 2, kThreads}) CHECK(each_once(items, threads));
    CHECK(each_once(20, kThreads, 7));
    for (int repeat = 0; repeat < 2000; ++repeat) CHECK(each_once(5, kThreads));

    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([&] {
            for (int repeat = 0; repeat < 300; ++repeat) wrong += !each_once(50, kThreads);
        });
    for (auto& caller : callers) caller.join();
    CHECK(wrong == 0);

#if defined(__unix__) && !defined(__SANITIZE_THREAD__)
    // ThreadSanitizer does not follow threads that are started after a fork.
    const pid_t child = fork();
    if (child == 0) _exit(each_once(50, kThreads) ? 0 : 1);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(each_once(50, kThreads));
#endif
    std::printf("%d failed checks\n", dsa_test::failures);
    return dsa_test::failures != 0;
}
