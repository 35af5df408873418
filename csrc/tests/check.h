// What the kernels' own tests share: a failing check prints where and counts, and every test runs on every
// instruction set that this processor has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dsa/runtime.h"
#include "dsa/tensor.h"

namespace dsa_test {

inline int failures = 0;

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            ++dsa_test::failures;                                                                     \
            std::fprintf(stderr, "%s:%d [%s]: %s\n", __FILE__, __LINE__, dsa_isa(), #condition);      \
        }                                                                                             \
    } while (0)

// A dense tensor over memory that lasts as long as `values`.
template <class T>
dsa_tensor tensor(std::vector<T>& values, std::vector<int64_t> sizes, int32_t dtype) {
    dsa_tensor result{};
    result.data = values.data();
    result.dtype = dtype;
    result.dims = static_cast<int32_t>(sizes.size());
    int64_t stride = 1;
    for (int dim = result.dims - 1; dim >= 0; --dim) {
        result.size[dim] = sizes[dim];
        result.stride[dim] = stride;
        stride *= sizes[dim];
    }
    return result;
}

inline std::vector<float> normal(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    std::vector<float> values(static_cast<size_t>(count));
    for (auto& value : values) value = distribution(generator);
    return values;
}

// Runs `test(threads)` on every instruction set, with one thread and with three. Returns what main returns.
template <class Test>
int on_every_isa(const Test& test) {
    const std::string names = dsa_isas();
    for (size_t begin = 0; begin <= names.size();) {
        const size_t end = std::min(names.find(',', begin), names.size());
        const std::string name = names.substr(begin, end - begin);
        begin = end + 1;
        if (dsa_set_isa(name.c_str()) != 0) {
            std::fprintf(stderr, "cannot use %s\n", name.c_str());
            return 1;
        }
        for (int threads : {1, 3}) test(threads);
        std::printf("%s: done\n", name.c_str());
    }
    std::printf("%d failed checks\n", failures);
    return failures != 0;
}

}  // namespace dsa_test
