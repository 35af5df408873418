// What a key can score at most, from eight numbers of it: of a long text nearly all keys are far from being selected, and
// to see that takes less than their scores.
//
// In a basis where the products of queries and keys gather in the first dims, the product over these plus the product of
// the lengths of the rest is an upper bound of the whole (Cauchy-Schwarz). So a vector's first seven numbers there and the
// length of the rest, its outline, are scored like a short key, and heads that only lower a score are left out. Pruning of
// inner products in such a basis: FEXIPRO (Li et al., SIGMOD 2017). The basis changes what is looked at, never the result.
//
// Shapes: Di index head dim.
#pragma once

#include <float.h>

#include "kernels/variant.h"

namespace dsa::DSA_ISA {
namespace {

// Numbers of an outline.
constexpr int64_t kOutline = 8;
// Bounds are of no use unless the first numbers make up so much of the products.
constexpr double kLeastShare = 0.6;
// More dims would take long to find a basis for, fewer are scored as fast.
constexpr int64_t kLeastOutlinedDim = 16, kMostOutlinedDim = 128;
// Products of vectors that are shorter could lose digits to underflow. Their outlines are unknown, and they are scored.
constexpr double kShortestOutlined = 1e-12;
// Scores that are hardly above zero are not told apart by bounds, for the same reason.
constexpr float kLowestBounded = 1e-30f;

// Turns the lower half of a symmetric positive matrix [dim, dim] into its Cholesky factor.
inline bool cholesky(double* m, int64_t dim) {
    for (int64_t j = 0; j < dim; ++j) {
        for (int64_t i = j; i < dim; ++i) {
            double sum = m[i * dim + j];
            for (int64_t k = 0; k < j; ++k) sum -= m[i * dim + k] * m[j * dim + k];
            if (i == j && !(sum > 0.0)) return false;
            m[i * dim + j] = i == j ? sqrt(sum) : sum / m[j * dim + j];
        }
    }
    return true;
}

// The eigenvalues of a symmetric matrix, which ends up on its diagonal, and its eigenvectors as columns of `vectors`:
// Jacobi's rotations, sweep after sweep.
inline void eigenvectors(double* m, double* vectors, int64_t dim) {
    for (int64_t i = 0; i < dim * dim; ++i) vectors[i] = i % (dim + 1) == 0 ? 1.0 : 0.0;
    for (int sweep = 0; sweep < 12; ++sweep) {
        double off_diagonal = 0.0, diagonal = 0.0;
        for (int64_t i = 0; i < dim; ++i)
            for (int64_t j = 0; j < dim; ++j) (i == j ? diagonal : off_diagonal) += m[i * dim + j] * m[i * dim + j];
        if (off_diagonal <= 1e-20 * diagonal) return;
        for (int64_t p = 0; p < dim; ++p) {
            for (int64_t q = p + 1; q < dim; ++q) {
                const double off = m[p * dim + q];
                if (off == 0.0) continue;
                const double slope = (m[q * dim + q] - m[p * dim + p]) / (2.0 * off);
                const double t = (slope < 0.0 ? -1.0 : 1.0) / (fabs(slope) + sqrt(slope * slope + 1.0));
                const double c = 1.0 / sqrt(t * t + 1.0), s = t * c;
                const auto rotate = [&](double& a, double& b) {
                    const double x = a, y = b;
                    a = c * x - s * y;
                    b = s * x + c * y;
                };
                for (int64_t i = 0; i < dim; ++i) rotate(m[i * dim + p], m[i * dim + q]);
                for (int64_t i = 0; i < dim; ++i) rotate(m[p * dim + i], m[q * dim + i]);
                for (int64_t i = 0; i < dim; ++i) rotate(vectors[i * dim + p], vectors[i * dim + q]);
            }
        }
    }
}

// The lower half of the second moments of a sample's rows, [Di, Di].
inline void add_moments(const float* row, int64_t dim, double* moments) {
    for (int64_t i = 0; i < dim; ++i)
        for (int64_t j = 0; j <= i; ++j) moments[i * dim + j] += static_cast<double>(row[i]) * static_cast<double>(row[j]);
}

// Two bases, one for queries and one for keys, with the products of both unchanged; together the dims are in order of how
// much they add to the products of a sample.
class OutlineBasis {
  public:
    static int64_t bytes(int64_t dim) { return 4 * dim * dim * static_cast<int64_t>(sizeof(double)); }

    OutlineBasis(int64_t dim, double* memory)
        : query_moments(memory),
          key_moments(memory + dim * dim),
          dim_(dim),
          of_query_(memory + 2 * dim * dim),
          of_key_(memory + 3 * dim * dim) {
        // What rounding can take from a bound, or add to a score, of a product of vectors of length one.
        slack_ = sqrt(1.2e-7 * static_cast<double>(dim) + 2e-6);
    }

    // Of a sample: `clear`, then `add_moments`, then `find`, which overwrites them.
    double *const query_moments, *const key_moments;

    void clear() { memset(query_moments, 0, static_cast<size_t>(2 * dim_ * dim_) * sizeof(double)); }

    // False where the sample says nothing, as of vectors that are not finite, or that products do not gather.
    bool find() {
        const int64_t dim = dim_;
        if (!make_positive(query_moments) || !make_positive(key_moments)) return false;
        double *factor = key_moments, *product = query_moments, *vectors = of_key_;
        if (!cholesky(factor, dim)) return false;
        // factor^T moments factor: what queries are once keys have lost their shape.
        for (int64_t i = 0; i < dim; ++i)
            for (int64_t j = 0; j < i; ++j) product[j * dim + i] = product[i * dim + j];
        for (int64_t i = 0; i < dim; ++i)
            for (int64_t j = 0; j < dim; ++j) {
                double sum = 0.0;
                for (int64_t k = j; k < dim; ++k) sum += product[i * dim + k] * factor[k * dim + j];
                of_query_[i * dim + j] = sum;
            }
        for (int64_t i = 0; i < dim; ++i)
            for (int64_t j = 0; j < dim; ++j) {
                double sum = 0.0;
                for (int64_t k = i; k < dim; ++k) sum += factor[k * dim + i] * of_query_[k * dim + j];
                product[i * dim + j] = sum;
            }
        eigenvectors(product, vectors, dim);
        return write(factor, product, vectors);
    }

    void of_query(const float* row, double* sums, float* out) const { outline(of_query_, unit_of_query_, row, 1.0, sums, out); }
    void of_key(const float* row, double scale, double* sums, float* out) const {
        outline(of_key_, unit_of_key_, row, scale, sums, out);
    }

  private:
    // Adds so much to the diagonal that the matrix has an inverse.
    bool make_positive(double* moments) const {
        double trace = 0.0;
        for (int64_t i = 0; i < dim_; ++i) trace += moments[i * (dim_ + 1)];
        if (!(trace > DBL_MIN && trace < DBL_MAX)) return false;
        for (int64_t i = 0; i < dim_; ++i) moments[i * (dim_ + 1)] += 1e-4 * trace / static_cast<double>(dim_);
        return true;
    }

    // Column j of both bases from the eigenvector with the j-th largest eigenvalue. `vectors` is where the keys' goes.
    bool write(const double* factor, double* values, double* vectors) {
        const int64_t dim = dim_;
        double first = 0.0, all = 0.0;
        for (int64_t j = 0; j < dim; ++j) {
            int64_t best = j;
            for (int64_t i = j; i < dim; ++i)
                if (values[i * (dim + 1)] > values[best * (dim + 1)]) best = i;
            const double value = values[best * (dim + 1)];
            values[best * (dim + 1)] = values[j * (dim + 1)];
            if (!(value > 0.0)) return false;
            all += sqrt(value);
            if (j < kOutline - 1) first += sqrt(value);
            const double root = sqrt(sqrt(value));
            for (int64_t i = 0; i < dim; ++i) {
                const double entry = vectors[i * dim + best];
                vectors[i * dim + best] = vectors[i * dim + j];
                vectors[i * dim + j] = entry;
            }
            for (int64_t i = 0; i < dim; ++i) {
                double sum = 0.0;
                for (int64_t k = 0; k <= i; ++k) sum += factor[i * dim + k] * vectors[k * dim + j];
                of_query_[i * dim + j] = sum / root;
            }
            for (int64_t i = dim; i-- > 0;) {
                double sum = vectors[i * dim + j];
                for (int64_t k = i + 1; k < dim; ++k) sum -= factor[k * dim + i] * vectors[k * dim + j];
                vectors[i * dim + j] = sum / factor[i * (dim + 1)];
            }
            for (int64_t i = 0; i < dim; ++i) vectors[i * dim + j] *= root;
        }
        if (first < kLeastShare * all) return false;
        unit_of_query_ = unit(of_query_);
        unit_of_key_ = unit(of_key_);
        return unit_of_query_ < DBL_MAX && unit_of_key_ < DBL_MAX;
    }

    // How long vectors of length one become; the product of both units is at least one.
    double unit(const double* basis) const {
        double sum = 0.0;
        for (int64_t i = 0; i < dim_ * dim_; ++i) sum += basis[i] * basis[i];
        return sqrt(sum / static_cast<double>(dim_));
    }

    void outline(const double* basis, double unit, const float* row, double scale, double* DSA_RESTRICT sums,
                 float* out) const {
        const int64_t dim = dim_;
        double length = 0.0, rest = 0.0, whole = 0.0;
        for (int64_t j = 0; j < dim; ++j) sums[j] = 0.0;
        for (int64_t i = 0; i < dim; ++i) {
            const double x = static_cast<double>(row[i]) * scale;
            length += x * x;
            for (int64_t j = 0; j < dim; ++j) sums[j] += x * basis[i * dim + j];
        }
        for (int64_t j = 0; j < dim; ++j) (j < kOutline - 1 ? whole : rest) += sums[j] * sums[j];
        length = sqrt(length);
        for (int64_t j = 0; j < kOutline - 1; ++j) out[j] = static_cast<float>(sums[j]);
        const bool known = length >= kShortestOutlined && scale > 0.0;
        out[kOutline - 1] =
            known ? static_cast<float>(sqrt(rest) + slack_ * (sqrt(whole + rest) + unit * length)) : __builtin_nanf("");
    }

    const int64_t dim_;
    double *const of_query_, *const of_key_;
    double unit_of_query_ = 0.0, unit_of_key_ = 0.0, slack_;
};

}  // namespace
}  // namespace dsa::DSA_ISA
