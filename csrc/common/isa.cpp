// Which instruction sets this processor has, and which one is in use.
#include "common/isa.h"

#include <atomic>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "dsa/runtime.h"

namespace dsa {
namespace {

#if defined(__x86_64__)
// The compiler's own checks include that the operating system saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx2_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif
bool has_baseline() { return true; }

struct Entry {
    const char* name;
    bool (*supported)();
};

constexpr Entry kEntries[] = {
#define DSA_ENTRY(name) {#name, has_##name},
    DSA_FOR_EACH_ISA(DSA_ENTRY)
#undef DSA_ENTRY
};
constexpr int kCount = sizeof(kEntries) / sizeof(kEntries[0]);

std::atomic<int> chosen{-1};

int best() {
    for (int entry = 0; entry < kCount; ++entry)
        if (kEntries[entry].supported()) return entry;
    return kCount - 1;
}

}  // namespace

bool prefetches_alone() {
#if defined(__x86_64__)
    // Zen 2 was measured (docs/log.md), and Zen 1 is taken to be like it. Zen 3 and Zen 5 gain from asking.
    return __builtin_cpu_is("znver1") || __builtin_cpu_is("znver2");
#else
    return false;
#endif
}

Isa current_isa() {
    int entry = chosen.load(std::memory_order_relaxed);
    if (entry < 0) {
        entry = best();
        chosen.store(entry, std::memory_order_relaxed);
    }
    return static_cast<Isa>(entry);
}

}  // namespace dsa

extern "C" {

int32_t dsa_abi_version(void) { return DSA_ABI_VERSION; }

const char* dsa_isas(void) {
    struct Names {
        char text[128] = "";
        Names() {
            for (const auto& entry : dsa::kEntries) {
                if (!entry.supported()) continue;
                if (text[0]) std::strcat(text, ",");
                std::strcat(text, entry.name);
            }
        }
    };
    static const Names names;
    return names.text;
}

const char* dsa_isa(void) { return dsa::kEntries[static_cast<int>(dsa::current_isa())].name; }

int32_t dsa_set_isa(const char* name) {
    for (int entry = 0; entry < dsa::kCount; ++entry) {
        if (std::strcmp(name, dsa::kEntries[entry].name) == 0 && dsa::kEntries[entry].supported()) {
            dsa::chosen.store(entry, std::memory_order_relaxed);
            return 0;
        }
    }
    return -1;
}

}  // extern "C"
