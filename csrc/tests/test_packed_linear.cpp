// Products with packed weights and their rows, against the layout written out in double precision.
#include "dsa/packed_linear.h"

#include "check.h"

using namespace dsa_test;

namespace {

struct Format {
    int32_t number;
    int bits, zero, parts;
    bool minimum, super;
    int64_t block_bytes() const { return 64 * bits + 16 * (super ? 1 : 2) * (parts + minimum); }
    int64_t head_bytes() const { return super ? 32 * (1 + minimum) : 0; }
};

constexpr Format kFormats[] = {
    {DSA_Q4_0, 4, 8, 1, false, false}, {DSA_Q4_1, 4, 0, 1, true, false},   {DSA_Q5_0, 5, 16, 1, false, false},
    {DSA_Q5_1, 5, 0, 1, true, false},  {DSA_Q8_0, 8, 128, 1, false, false}, {DSA_Q4_K, 4, 0, 1, true, true},
    {DSA_Q5_K, 5, 0, 1, true, true},   {DSA_Q6_K, 6, 32, 2, false, true},
};

// fp16 of 1 to 2 times 2^-6, by ten bits.
uint16_t half(unsigned bits) { return static_cast<uint16_t>((9 << 10) | (bits & 1023)); }
double value_of_half(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return std::ldexp(1 + (bits & 1023) / 1024.0, -6);
}

struct Panels {
    std::vector<uint8_t> bytes;
    std::vector<double> numbers;
};

Panels random_panels(const Format& f, int64_t rows, int64_t columns) {
    std::mt19937 random(7);
    const int64_t panels = (rows + 15) / 16, blocks = (columns + 31) / 32;
    Panels made;
    made.numbers.resize(panels * 16 * columns);
    for (int64_t p = 0; p < panels; ++p) {
        size_t head = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            if (f.super && b % 8 == 0) {
                head = made.bytes.size();
                for (int i = 0; i < f.head_bytes() / 2; ++i) {
                    const uint16_t bits = half(random());
                    made.bytes.push_back(bits & 255);
                    made.bytes.push_back(bits >> 8);
                }
            }
            const size_t at = made.bytes.size(), scales = at + 64 * f.bits, minima = scales + 16 * f.parts * (f.super ? 1 : 2);
            while (made.bytes.size() < scales) made.bytes.push_back(random() & 255);
            while (made.bytes.size() < at + f.block_bytes()) {
                const uint16_t bits = f.super ? random() & 255 : half(random());
                made.bytes.push_back(bits & 255);
                if (!f.super) made.bytes.push_back(bits >> 8);
            }
            const uint8_t* data = made.bytes.data();
            for (int row = 0; row < 16; ++row) {
                for (int64_t c = 0; c < 32 && b * 32 + c < columns; ++c) {
                    const int64_t word = c / 4, byte = row * 4 + c % 4;
                    int quant = data[at + (f.bits == 8 ? word : word % 4) * 64 + byte];
                    if (f.bits < 8) quant = quant >> (word < 4 ? 0 : 4) & 15;
                    if (f.bits == 5) quant += (data[at + 256 + byte] >> word & 1) * 16;
                    if (f.bits == 6) quant += (data[at + 256 + word / 4 * 64 + byte] >> word % 4 * 2 & 3) * 16;
                    const int64_t place = (c * f.parts / 32) * 16 + row;
                    double scale, minimum = 0;
                    if (f.super) {
                        const double shared = value_of_half(data + head + row * 2);
                        scale = shared * (f.minimum ? data[scales + place] : static_cast<int8_t>(data[scales + place]));
                        if (f.minimum) minimum = -value_of_half(data + head + 32 + row * 2) * data[minima + row];
                    } else {
                        scale = value_of_half(data + scales + place * 2);
                        if (f.minimum) minimum = value_of_half(data + minima + row * 2);
                    }
                    made.numbers[(p * 16 + row) * columns + b * 32 + c] = scale * (quant - f.zero) + minimum;
                }
            }
        }
    }
    return made;
}

// Activations as the kernel rounds them.
std::vector<double> rounded(const std::vector<float>& input, int64_t tokens, int64_t columns) {
    std::vector<double> out(input.size());
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t first = 0; first < columns; first += 32) {
            const int64_t last = std::min(first + 32, columns);
            float largest = 0;
            for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(input[t * columns + i]));
            const float inverse = 127.0f / largest, scale = largest / 127.0f;
            for (int64_t i = first; i < last; ++i)
                out[t * columns + i] = static_cast<double>(scale) * std::nearbyint(input[t * columns + i] * inverse);
        }
    }
    return out;
}

void agrees_with_the_layout(const Format& f, int64_t tokens, int64_t rows, int64_t columns, int threads) {
    Panels weight = random_panels(f, rows, columns);
    auto input = normal(tokens * columns, 1), bias = normal(rows, 2);
    std::vector<float> output(tokens * rows, NAN), numbers(2 * columns, NAN);
    dsa_packed_linear_args args{};
    args.input = tensor(input, {tokens, columns}, DSA_F32);
    args.output = tensor(output, {tokens, rows}, DSA_F32);
    args.panels = weight.bytes.data();
    args.bias = bias.data();
    args.format = f.number;
    args.threads = threads;
    CHECK(dsa_packed_linear(&args) == DSA_OK);
    const auto x = rounded(input, tokens, columns);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t n = 0; n < rows; ++n) {
            double sum = bias[n], size = std::fabs(bias[n]);
            for (int64_t c = 0; c < columns; ++c) {
                const double product = x[t * columns + c] * weight.numbers[n * columns + c];
                sum += product;
                size += std::fabs(product);
            }
            CHECK(std::fabs(output[t * rows + n] - sum) <= 1e-5 * size);
        }
    }
    std::vector<int32_t> index = {static_cast<int32_t>(rows - 1), 0};
    dsa_packed_rows_args asked{};
    asked.index = tensor(index, {2}, DSA_I32);
    asked.output = tensor(numbers, {2, columns}, DSA_F32);
    asked.panels = weight.bytes.data();
    asked.rows = rows;
    asked.format = f.number;
    asked.threads = threads;
    CHECK(dsa_packed_rows(&asked) == DSA_OK);
    for (int64_t i = 0; i < 2 * columns; ++i) {
        const double expected = weight.numbers[index[i / columns] * columns + i % columns];
        CHECK(std::fabs(numbers[i] - expected) <= 1e-6 * std::fabs(expected) + 1e-5);
    }
    index[1] = static_cast<int32_t>(rows);
    CHECK(dsa_packed_rows(&asked) == DSA_OUT_OF_RANGE);
}

void every_case(int threads) {
    for (const Format& f : kFormats)
        for (int64_t tokens : {1, 2, 31}) agrees_with_the_layout(f, tokens, tokens == 2 ? 5 : 37, f.super ? 512 : 76, threads);
}

}  // namespace

int main() { return on_every_isa(every_case); }
