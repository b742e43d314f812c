// The lens statistics of rows of logits, one row at a time: top-k lists, entropies and divergences in three passes over a row
// that stays in the cache. What it computes, and the names: capture/lens_kernel.py. Formulas: capture/divergence.py.
//
// Written in the vector extensions that gcc and clang share, so that it compiles for any processor.

#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats that go through the arithmetic together: as many as the processor takes
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 512;         // floats that are added up in float32 before float64 takes over; what one step works on
constexpr int GROUP = 4 * LANES;   // floats that are compared with a list's last value at once
constexpr float NOTHING = -1e30f;  // stands behind the last logit of a row: its exp() is 0

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef double vd __attribute__((vector_size(8 * LANES)));

inline vf all(float x) { return vf{} + x; }
inline vf read(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void write(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf size_of(vf x) { return (vf)((vi)x & 0x7fffffff); }
inline vd wide(vf x) { return __builtin_convertvector(x, vd); }

inline double sum(vd x) {
    double s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

inline float largest(vf x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// Which lanes are above a limit, a bit each.
inline unsigned above(vf x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ));
#else
    unsigned bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (unsigned)(x[i] > limit) << i;
    return bits;
#endif
}

// exp(x) for x <= 0, to 1.5 ulp; 0 below -87. x = n ln 2 + r: 2^n times the Taylor series of exp(r), |r| < 0.35.
inline vf exp_of(vf x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    vf t = x * 1.44269504f + magic;
    vf n = t - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf y = (vf)((vi)p + ((vi)t << 23));
    return x < -87.0f ? vf{} : y;
}

// The k largest so far, best first; of equal values the one that came first stays in front.
struct List {
    float* values;
    int64_t* ids;
    int k, n;
    float last;  // what a value must exceed

    void start(float* v, int64_t* i, int size) { values = v; ids = i; k = size; n = 0; last = -__builtin_inff(); }

    void take(float x, int64_t id) {
        int at = n < k ? n++ : k - 1;
        while (at > 0 && values[at - 1] < x) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
            at--;
        }
        values[at] = x;
        ids[at] = id;
        if (n == k) last = values[k - 1];
    }

    // Entries first..first+count of a row. sign: -1 where the smallest are wanted; values are then kept negated.
    void look(const float* x, int count, int64_t first, float sign) {
        int i = 0;
        for (; i < count && n < k; i++) take(x[i] * sign, first + i);
        for (; i < count && i % GROUP; i++)
            if (x[i] * sign > last) take(x[i] * sign, first + i);
        for (; i + GROUP <= count; i += GROUP) {
            vf v[4], m;
            for (int j = 0; j < 4; j++) v[j] = read(x + i + j * LANES) * sign;
            m = larger(larger(v[0], v[1]), larger(v[2], v[3]));
            if (!above(m, last)) continue;
            for (int j = 0; j < 4; j++)
                for (unsigned bits = above(v[j], last); bits; bits &= bits - 1) {
                    int lane = __builtin_ctz(bits);
                    if (v[j][lane] > last) take(v[j][lane], first + i + j * LANES + lane);
                }
        }
        for (; i < count; i++)
            if (x[i] * sign > last) take(x[i] * sign, first + i);
    }
};

// A row of one slot or of one shift: a sum of rows, each added or taken off. Terms are numbers of tensors, from 1; negative: off.
struct Sum {
    const int32_t* terms;
    int n;

    // `count` entries from `at` on, into `space` [BLOCK] where they are not there already; `filler` behind them.
    const float* get(const float* const* rows, int64_t at, int count, float* space, float filler) const {
        if (n == 1 && terms[0] > 0 && count == BLOCK) return rows[terms[0] - 1] + at;
        for (int i = 0; i < n; i++) {
            const float* x = rows[(terms[i] < 0 ? -terms[i] : terms[i]) - 1] + at;
            float sign = terms[i] < 0 ? -1.0f : 1.0f;
            int j = 0;
            if (i == 0 && n > 1) {  // two at once: nearly always there are two
                const float* y = rows[(terms[1] < 0 ? -terms[1] : terms[1]) - 1] + at;
                float other = terms[1] < 0 ? -1.0f : 1.0f;
                for (; j + LANES <= count; j += LANES) write(space + j, read(x + j) * sign + read(y + j) * other);
                for (; j < count; j++) space[j] = x[j] * sign + y[j] * other;
                i = 1;
            } else if (i == 0) {
                for (; j < count; j++) space[j] = x[j] * sign;
            } else {
                for (; j < count; j++) space[j] += x[j] * sign;
            }
        }
        for (int j = n ? count : 0; j < BLOCK; j++) space[j] = j < count ? 0.0f : filler;
        return space;
    }
};

}  // namespace

extern "C" {

struct Tile {
    const float* const* tensors;  // of the rows that slots and shifts are sums of, [rows, stride] each
    const int64_t* strides;
    int64_t vocab, listed;        // entries of a row; of these, how many may be in top-k lists
    int32_t n_tensors, n_slots, n_pairs, k;
    const int32_t* slot_terms;    // [slots, 4], 0 behind the last
    const int32_t* pair_terms;    // [pairs, 4]
    const int32_t* pairs;         // [pairs, 2]: slots a, b
    int64_t rows;
    double *entropy, *logsumexp;  // [slots, rows]
    double *ba, *ab;              // [pairs, rows]: KL(b || a), KL(a || b)
    int64_t* ids;                 // [slots + 2 pairs, rows, k]: of each slot, then of each shift: increased, decreased
    float* values;
    uint8_t* finite;              // [rows]: 0 where a logit is not: the row's results are then of no use
};

// Rows first..last. space: (slots * (vocab rounded up to BLOCK) + 8 * BLOCK) floats of the caller's, of one thread.
// Slots, tensors: 16 at most; pairs: 120.
void lens_rows(const Tile* t, int64_t first, int64_t last, float* space) {
    const int64_t padded = (t->vocab + BLOCK - 1) / BLOCK * BLOCK;
    float* own = space + t->n_slots * padded;  // room for two rows that are sums
    float* other = own + BLOCK;
    for (int64_t row = first; row < last; row++) {
        const float* rows[16];
        for (int i = 0; i < t->n_tensors; i++) rows[i] = t->tensors[i] + row * t->strides[i];
        Sum slots[16], shifts[120];
        for (int s = 0; s < t->n_slots; s++) {
            slots[s] = {t->slot_terms + 4 * s, 0};
            while (slots[s].n < 4 && slots[s].terms[slots[s].n]) slots[s].n++;
        }
        for (int p = 0; p < t->n_pairs; p++) {
            shifts[p] = {t->pair_terms + 4 * p, 0};
            while (shifts[p].n < 4 && shifts[p].terms[shifts[p].n]) shifts[p].n++;
        }
        List lists[16 + 240];
        for (int i = 0; i < t->n_slots + 2 * t->n_pairs; i++) {
            int64_t at = (i * t->rows + row) * t->k;
            lists[i].start(t->values + at, t->ids + at, t->k);
        }

        // First: the lists, the largest logits, and whether all are finite.
        vf largest_of[16], wrong = vf{};
        for (int s = 0; s < t->n_slots; s++) largest_of[s] = all(NOTHING);
        for (int64_t at = 0; at < t->vocab; at += BLOCK) {
            int count = t->vocab - at < BLOCK ? t->vocab - at : BLOCK;
            int listed = t->listed - at < count ? (t->listed > at ? t->listed - at : 0) : count;
            for (int s = 0; s < t->n_slots; s++) {
                const float* x = slots[s].get(rows, at, count, own, NOTHING);
                vf m = largest_of[s];
                for (int i = 0; i < BLOCK; i += LANES) {
                    vf v = read(x + i);
                    m = larger(v, m);
                    wrong += v * 0.0f;
                }
                largest_of[s] = m;
                lists[s].look(x, listed, at, 1.0f);
            }
            for (int p = 0; p < t->n_pairs; p++) {
                const float* d = shifts[p].get(rows, at, count, own, 0.0f);
                lists[t->n_slots + 2 * p].look(d, listed, at, 1.0f);
                lists[t->n_slots + 2 * p + 1].look(d, listed, at, -1.0f);
            }
        }
        float none = 0;
        for (int i = 0; i < LANES; i++) none += wrong[i];
        t->finite[row] = none == 0.0f;
        if (none != 0.0f) continue;
        for (int p = 0; p < t->n_pairs; p++) {
            List& down = lists[t->n_slots + 2 * p + 1];
            for (int i = 0; i < down.n; i++) down.values[i] = -down.values[i];
        }

        // Second: e = exp(logit - largest), kept; Z = sum e; H = log Z - sum e (logit - largest) / Z.
        float inverse[16];
        double lse[16];
        for (int s = 0; s < t->n_slots; s++) {
            float m = largest(largest_of[s]);
            vd z = vd{}, mean = vd{};
            for (int64_t at = 0; at < t->vocab; at += BLOCK) {
                int count = t->vocab - at < BLOCK ? t->vocab - at : BLOCK;
                const float* x = slots[s].get(rows, at, count, own, NOTHING);
                float* kept = space + s * padded + at;
                vf zs = vf{}, means = vf{};
                for (int i = 0; i < BLOCK; i += LANES) {
                    vf y = read(x + i) - m;
                    vf e = exp_of(y);
                    write(kept + i, e);
                    zs += e;
                    means += e * y;
                }
                z += wide(zs);
                mean += wide(means);
            }
            double total = sum(z), log_z = __builtin_log(total);
            lse[s] = log_z + m;
            inverse[s] = (float)(1.0 / total);
            t->logsumexp[s * t->rows + row] = lse[s];
            t->entropy[s * t->rows + row] = log_z - sum(mean) / total;
        }

        // Third: with d = log p_b - log p_a, u = |d|, hi the larger of p_a and p_b, lo = hi exp(-u) the other one,
        // KL(hi || lo) has the terms hi q, q = exp(-u) - 1 + u, and KL(lo || hi) hi r, r = 1 - (1 + u) exp(-u): both >= 0.
        // Small ones, which consist of differences of large numbers, come from the Taylor series of q, and r = u^2 - (1 + u) q.
        for (int p = 0; p < t->n_pairs; p++) {
            int a = t->pairs[2 * p], b = t->pairs[2 * p + 1];
            const float c = (float)(lse[b] - lse[a]), ia = inverse[a], ib = inverse[b];
            vd sum_ba = vd{}, sum_ab = vd{};
            for (int64_t at = 0; at < t->vocab; at += BLOCK) {
                int count = t->vocab - at < BLOCK ? t->vocab - at : BLOCK;
                const float* x = shifts[p].get(rows, at, count, other, 0.0f);
                const float *ea = space + a * padded + at, *eb = space + b * padded + at;
                vf ba = vf{}, ab = vf{};
                for (int i = 0; i < BLOCK; i += LANES) {
                    vf d = read(x + i) - c;
                    vf u = size_of(d);
                    vf series = u * (1.0f / 40320) - 1.0f / 5040;
                    series = series * u + 1.0f / 720;
                    series = series * u - 1.0f / 120;
                    series = series * u + 1.0f / 24;
                    series = series * u - 1.0f / 6;
                    series = series * u + 0.5f;
                    vf square = u * u, q_near = square * series;
                    vf pa = read(ea + i) * ia, pb = read(eb + i) * ib;
                    vf hi = larger(pa, pb), lo = pa < pb ? pa : pb;
                    vf q = u < 0.5f ? hi * q_near : lo + hi * (u - 1.0f);
                    vf r = u < 0.5f ? hi * (square - (u + 1.0f) * q_near) : hi - (u + 1.0f) * lo;
                    ba += d > 0.0f ? q : r;
                    ab += d > 0.0f ? r : q;
                }
                sum_ba += wide(ba);
                sum_ab += wide(ab);
            }
            double x = sum(sum_ba), y = sum(sum_ab);
            t->ba[p * t->rows + row] = x < 0 ? 0 : x;
            t->ab[p * t->rows + row] = y < 0 ? 0 : y;
        }
    }
}

}  // extern "C"
