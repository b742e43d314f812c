// The statistics of rows of float32 states, and of rows of logits, one row at a time in memory that stays in the cache. Of logits:
// what is largest in each block and from that the top-k lists, then entropies, then divergences. What is computed, and the names:
// capture/lens_kernel.py. Formulas: capture/divergence.py, capture/statistics.py.
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
constexpr double SURE = 40;        // sum (p_a + p_b) |d| over a KL, up to which plain sums have the KL to 1e-4 (worst seen: 5e-5)
constexpr double SURE_KL = 3e-3;   // nats; and down to which
constexpr int MOST_LISTED = 256;    // longer lists are made without a guess at their last entry
constexpr float NOTHING = -1e30f;  // stands behind the last logit of a row: its exp() is 0

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
// As many float64 as the processor takes: gcc goes through wider vectors number by number.
typedef double vd __attribute__((vector_size(4 * LANES)));
typedef float vh __attribute__((vector_size(2 * LANES)));
constexpr int WIDE = LANES / 2;

inline vf all(float x) { return vf{} + x; }
inline vf read(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void write(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)
inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
inline vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
#endif
inline vf size_of(vf x) { return (vf)((vi)x & 0x7fffffff); }
#if defined(__AVX512F__)
inline vd wide(const float* p) { return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }  // gcc 12 converts half by half
#else
inline vd wide(const float* p) { vh v; std::memcpy(&v, p, sizeof v); return __builtin_convertvector(v, vd); }
#endif
inline vd added(vf x) { float halves[LANES]; std::memcpy(halves, &x, sizeof x); return wide(halves) + wide(halves + WIDE); }

inline double sum(vd x) {
    double s = 0;
    for (int i = 0; i < WIDE; i++) s += x[i];
    return s;
}

inline float largest(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
#endif
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

    // Entries below the k-th largest of the largest of n blocks are not among the k largest. `space`: k floats.
    void expect(const float* largest_of, int n, float* space) {
        if (n < k) return;
        List least;
        int64_t places[MOST_LISTED];
        if (k > MOST_LISTED) return;
        least.start(space, places, k);
        for (int i = 0; i < n; i++)
            if (largest_of[i] > least.last || least.n < k) least.take(largest_of[i], i);
        last = __builtin_nextafterf(least.last, -__builtin_inff());
    }

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
};

// Where a row's entries come from: memory, or the difference of two rows that are there.
struct Read {
    const float* x;
    float at(int i) const { return x[i]; }
    vf some(int i) const { return read(x + i); }
};

struct Difference {
    const float *x, *y;
    float at(int i) const { return x[i] - y[i]; }
    vf some(int i) const { return read(x + i) - read(y + i); }
};

// The largest and the smallest of `count` entries of a row.
template <class Row>
inline void ends(Row x, int count, float* high, float* low) {
    vf top = all(-__builtin_inff()), bottom = all(__builtin_inff());
    int i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {  // four at once: one waits for the one before
        vf v = x.some(i), w = x.some(i + LANES), y = x.some(i + 2 * LANES), z = x.some(i + 3 * LANES);
        top = larger(larger(larger(v, w), larger(y, z)), top);
        bottom = smaller(smaller(smaller(v, w), smaller(y, z)), bottom);
    }
    float h = largest(top), l = -largest(-bottom);
    for (; i < count; i++) {
        h = x.at(i) > h ? x.at(i) : h;
        l = x.at(i) < l ? x.at(i) : l;
    }
    *high = h;
    *low = l;
}

// Entries first..first+count of a row for the list of the largest; with sign -1 for that of the smallest, which is kept negated.
template <class Row>
void look(Row x, int count, int64_t first, List& list, float sign) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        vf v = x.some(i) * sign;
        for (unsigned bits = above(v, list.last); bits; bits &= bits - 1) {
            int lane = __builtin_ctz(bits);
            if (v[lane] > list.last) list.take(v[lane], first + i + lane);
        }
    }
    for (; i < count; i++)
        if (x.at(i) * sign > list.last) list.take(x.at(i) * sign, first + i);
}

// A row of one slot or of one shift: a sum of rows, each added or taken off. Terms are numbers of tensors, from 1; negative: off.
struct Sum {
    const int32_t* terms;
    int n;

    bool is_difference() const { return n == 2 && terms[0] > 0 && terms[1] < 0; }

    Difference difference(const float* const* rows, int64_t at) const {
        return {rows[terms[0] - 1] + at, rows[-terms[1] - 1] + at};
    }

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

// From slot a to slot b: a sum of rows, or where that has no terms, the difference of both slots' logits as they are rounded.
struct Shift {
    Sum sum;
    const Sum *a, *b;

    bool is_difference() const { return sum.is_difference(); }
    bool is_rounded() const { return sum.n == 0 || (a->n == 1 && b->n == 1); }
    Difference difference(const float* const* rows, int64_t at) const { return sum.difference(rows, at); }

    // As Sum::get, with 0 behind the entries. second: BLOCK floats of space, too.
    const float* get(const float* const* rows, int64_t at, int count, float* space, float* second) const {
        if (sum.n) return sum.get(rows, at, count, space, 0.0f);
        const float *x = b->get(rows, at, count, space, 0.0f), *y = a->get(rows, at, count, second, 0.0f);
        for (int i = 0; i < BLOCK; i += LANES) write(space + i, read(x + i) - read(y + i));
        return space;
    }
};

// What rounding takes off x + y (Knuth's two-sum).
template <class T>
inline T lost(T x, T y) {
    T s = x + y, of_y = s - x;
    return (x - (s - of_y)) + (y - of_y);
}

// sum of weights [BLOCK] times what rounding takes off a sum of rows.
vd lost_of(const Sum& sum, const float* const* rows, int64_t at, int count, const float* weights) {
    const float *x = rows[sum.terms[0] - 1] + at, *y = rows[sum.terms[1] - 1] + at;
    const float* z = sum.n > 2 ? rows[sum.terms[2] - 1] + at : nullptr;
    vf found = vf{};
    int j = 0;
    for (; j + LANES <= count; j += LANES) {
        vf a = read(x + j), b = read(y + j), off = lost(a, b);
        if (z) off += lost(a + b, read(z + j));
        found += read(weights + j) * off;
    }
    vd total = added(found);
    for (; j < count; j++) total[0] += weights[j] * (lost(x[j], y[j]) + (z ? lost(x[j] + y[j], z[j]) : 0.0f));
    return total;
}

struct Kl { double ba, ab, apart; };

// KL(b || a), KL(a || b) and the mean of |d| under the larger of both, for slots that hardly differ. With d = log p_b - log p_a,
// u = |d|, hi the larger of p_a and p_b, lo = hi exp(-u) the other one, KL(hi || lo) has the terms hi q, q = exp(-u) - 1 + u, and
// KL(lo || hi) hi r, r = 1 - (1 + u) exp(-u): both >= 0, where p d has both signs. Small ones, which consist of differences of
// large numbers, come from the Taylor series of q, and r = u^2 - (1 + u) q.
Kl near(const Shift& shift, const float* const* rows, int64_t vocab, double c, const float* ea, const float* eb, double inverse_a,
        double inverse_b, float* space, float* second) {
    const float ia = (float)inverse_a, ib = (float)inverse_b;
    vd sum_ba = vd{}, sum_ab = vd{}, sum_u = vd{};
    for (int64_t at = 0; at < vocab; at += BLOCK) {
        int count = vocab - at < BLOCK ? vocab - at : BLOCK;
        const float* x = shift.get(rows, at, count, space, second);
        vf ba = vf{}, ab = vf{}, us = vf{};
        for (int i = 0; i < BLOCK; i += LANES) {
            vf d = read(x + i) - (float)c;
            vf u = size_of(d);
            vf series = u * (1.0f / 40320) - 1.0f / 5040;
            series = series * u + 1.0f / 720;
            series = series * u - 1.0f / 120;
            series = series * u + 1.0f / 24;
            series = series * u - 1.0f / 6;
            series = series * u + 0.5f;
            vf square = u * u, q_near = square * series;
            vf pa = read(ea + at + i) * ia, pb = read(eb + at + i) * ib;
            vf hi = larger(pa, pb), lo = smaller(pa, pb);
            vf q = u < 0.5f ? hi * q_near : lo + hi * (u - 1.0f);
            vf r = u < 0.5f ? hi * (square - (u + 1.0f) * q_near) : hi - (u + 1.0f) * lo;
            us += hi * u;
            ba += d > 0.0f ? q : r;
            ab += d > 0.0f ? r : q;
        }
        sum_ba += added(ba);
        sum_ab += added(ab);
        sum_u += added(us);
    }
    double ba = sum(sum_ba), ab = sum(sum_ab);
    return {ba < 0 ? 0 : ba, ab < 0 ? 0 : ab, sum(sum_u)};
}

// The Euclidean norm of a row, summed in float64. Four sums at a time: one alone waits for itself.
double norm(const float* x, int64_t size) {
    vd total[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDE <= size; i += 4 * WIDE)
        for (int j = 0; j < 4; j++) {
            vd v = wide(x + i + j * WIDE);
            total[j] += v * v;
        }
    double s = sum(total[0] + total[1] + total[2] + total[3]);
    for (; i < size; i++) s += (double)x[i] * x[i];
    return __builtin_sqrt(s);
}

struct Apart { double turned, far; };

// turned: the cosine distance |a/|a| - b/|b||^2 / 2 = |a - b |a|/|b||^2 / (2 |a|^2), which is 0 for a = b; of a zero vector 1 from any other, and 0 from another one. far: |b - a|.
Apart apart(const float* a, double norm_a, const float* b, double norm_b, int64_t size) {
    const double size_a = norm_a > 0 ? norm_a : 1, ratio = size_a / (norm_b > 0 ? norm_b : 1);
    vd angles[2] = {}, squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * WIDE <= size; i += 2 * WIDE)
        for (int j = 0; j < 2; j++) {
            vd x = wide(a + i + j * WIDE), y = wide(b + i + j * WIDE), d = y - x, u = x - y * ratio;
            angles[j] += u * u;
            squares[j] += d * d;
        }
    double angle = sum(angles[0] + angles[1]), square = sum(squares[0] + squares[1]);
    for (; i < size; i++) {
        double x = a[i], y = b[i], u = x - y * ratio;
        angle += u * u;
        square += (y - x) * (y - x);
    }
    return {(norm_a == 0) != (norm_b == 0) ? 1.0 : angle / size_a / size_a / 2, __builtin_sqrt(square)};
}

}  // namespace

extern "C" {

struct Tile {
    const float* const* tensors;  // of the rows that slots and shifts are sums of, [rows, stride] each
    const int64_t* strides;
    int64_t vocab, listed;        // entries of a row; of these, how many may be in top-k lists
    int32_t n_tensors, n_slots, n_pairs, k;
    const int32_t* slot_terms;    // [slots, 4], 0 behind the last
    const int32_t* pair_terms;    // [pairs, 4]: see Shift
    const int32_t* pairs;         // [pairs, 2]: slots a, b
    int64_t rows;
    double *entropy, *logsumexp;  // [slots, rows]
    double *ba, *ab;              // [pairs, rows]: KL(b || a), KL(a || b)
    double *apart;                // [pairs, rows]: the mean of |d| under the larger of both, see below
    int64_t* ids;                 // [slots + 2 pairs, rows, k]: of each slot, then of each shift: increased, decreased
    float* values;
    uint8_t* finite;              // [rows]: 0 where a logit is not: the row's results are then of no use
};

// Rows first..last. space: with B = vocab / BLOCK rounded up, (slots * BLOCK + slots + 2 pairs) * B + 2 * BLOCK floats of the
// caller's, of one thread.
// Slots, tensors: 16 at most; pairs: 120.
void lens_rows(const Tile* t, int64_t first, int64_t last, float* space) {
    const int64_t padded = (t->vocab + BLOCK - 1) / BLOCK * BLOCK;
    float* own = space + t->n_slots * padded;  // room for two rows that are sums
    float* other = own + BLOCK;
    float* highest = other + BLOCK;  // of each block for each list, negated where the smallest are wanted
    const int64_t blocks = padded / BLOCK;
    for (int64_t row = first; row < last; row++) {
        const float* rows[16];
        for (int i = 0; i < t->n_tensors; i++) rows[i] = t->tensors[i] + row * t->strides[i];
        Sum slots[16];
        Shift shifts[120];
        for (int s = 0; s < t->n_slots; s++) {
            slots[s] = {t->slot_terms + 4 * s, 0};
            while (slots[s].n < 4 && slots[s].terms[slots[s].n]) slots[s].n++;
        }
        for (int p = 0; p < t->n_pairs; p++) {
            shifts[p] = {{t->pair_terms + 4 * p, 0}, slots + t->pairs[2 * p], slots + t->pairs[2 * p + 1]};
            Sum& sum = shifts[p].sum;
            while (sum.n < 4 && sum.terms[sum.n]) sum.n++;
        }
        List lists[16 + 240];
        for (int i = 0; i < t->n_slots + 2 * t->n_pairs; i++) {
            int64_t at = (i * t->rows + row) * t->k;
            lists[i].start(t->values + at, t->ids + at, t->k);
        }

        // First: the largest and the smallest of every block, and whether all are finite.
        vf wrong = vf{};
        float largest_of[16];
        for (int s = 0; s < t->n_slots; s++) largest_of[s] = NOTHING;
        for (int64_t at = 0, block = 0; at < t->vocab; at += BLOCK, block++) {
            int count = t->vocab - at < BLOCK ? t->vocab - at : BLOCK;
            int listed = t->listed - at < count ? (t->listed > at ? t->listed - at : 0) : count;
            for (int s = 0; s < t->n_slots; s++) {
                const float* x = slots[s].get(rows, at, count, own, NOTHING);
                float high, low;
                ends(Read{x}, count, &high, &low);
                largest_of[s] = high > largest_of[s] ? high : largest_of[s];
                for (int i = 0; i < BLOCK; i += LANES) wrong += read(x + i) * 0.0f;
                if (listed < count) ends(Read{x}, listed, &high, &low);
                highest[s * blocks + block] = high;
            }
            for (int p = 0; p < t->n_pairs; p++) {
                float *high = highest + (t->n_slots + 2 * p) * blocks + block, *low = high + blocks;
                if (shifts[p].is_difference())
                    ends(shifts[p].difference(rows, at), listed, high, low);
                else
                    ends(Read{shifts[p].get(rows, at, count, own, other)}, listed, high, low);
                *low = -*low;
            }
        }
        float none = 0;
        for (int i = 0; i < LANES; i++) none += wrong[i];
        t->finite[row] = none == 0.0f;
        if (none != 0.0f) continue;

        // The lists, from blocks that may hold entries of theirs.
        for (int i = 0; i < t->n_slots + 2 * t->n_pairs; i++) {
            const float* high = highest + i * blocks;
            List& list = lists[i];
            list.expect(high, t->listed / BLOCK, own);
            int pair = i < t->n_slots ? -1 : (i - t->n_slots) / 2;
            float sign = pair >= 0 && (i - t->n_slots) % 2 ? -1.0f : 1.0f;
            for (int64_t at = 0, block = 0; at < t->listed; at += BLOCK, block++) {
                if (!(high[block] > list.last)) continue;
                int count = t->vocab - at < BLOCK ? t->vocab - at : BLOCK;
                int listed = t->listed - at < count ? t->listed - at : count;
                if (pair >= 0 && shifts[pair].is_difference()) {
                    look(shifts[pair].difference(rows, at), listed, at, list, sign);
                } else {
                    const float* x = pair < 0 ? slots[i].get(rows, at, count, own, 0.0f)
                                              : shifts[pair].get(rows, at, count, own, other);
                    look(Read{x}, listed, at, list, sign);
                }
            }
        }
        for (int p = 0; p < t->n_pairs; p++) {
            List& down = lists[t->n_slots + 2 * p + 1];
            for (int i = 0; i < down.n; i++) down.values[i] = -down.values[i];
        }

        // Second: e = exp(logit - largest), kept; Z = sum e; H = log Z - sum e (logit - largest) / Z.
        double inverse[16], lse[16];
        double exact[16];  // log-sum-exp of sums as they were before rounding: shifts that are not `is_rounded` are of those
        for (int s = 0; s < t->n_slots; s++) {
            float m = largest_of[s];
            vd z = vd{}, mean = vd{}, off = vd{};
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
                z += added(zs);
                mean += added(means);
                if (slots[s].n > 1) off += lost_of(slots[s], rows, at, count, kept);
            }
            double total = sum(z), log_z = __builtin_log(total);
            lse[s] = log_z + m;
            exact[s] = lse[s] + sum(off) / total;
            inverse[s] = 1.0 / total;
            t->logsumexp[s * t->rows + row] = lse[s];
            t->entropy[s * t->rows + row] = log_z - sum(mean) / total;
        }

        // Third: KL(b || a) = sum p_b d, KL(a || b) = -sum p_a d, with d = log p_b - log p_a; log-sum-exp as a float and what is
        // left of it. Rounding costs these sums about 1e-7 of sum (p_a + p_b) |d|, and up to 1e-7 where few tokens have all the
        // weight: a KL for which that is too much comes from `near`.
        for (int p = 0; p < t->n_pairs; p++) {
            int a = t->pairs[2 * p], b = t->pairs[2 * p + 1];
            Kl found = {0, 0, -1};
            if (shifts[p].is_rounded()) {
                const float la = (float)lse[a], lb = (float)lse[b];
                const double left = (lse[b] - lb) - (lse[a] - la);
                vd under_a = vd{}, under_b = vd{}, size_a = vd{}, size_b = vd{};
                for (int64_t at = 0; at < t->vocab; at += BLOCK) {
                    int count = t->vocab - at < BLOCK ? t->vocab - at : BLOCK;
                    const float *ea = space + a * padded + at, *eb = space + b * padded + at;
                    const float *xa = slots[a].get(rows, at, count, own, 0.0f), *xb = slots[b].get(rows, at, count, other, 0.0f);
                    vf pa = vf{}, pb = vf{}, ua = vf{}, ub = vf{};
                    for (int i = 0; i < BLOCK; i += LANES) {
                        vf d = (read(xb + i) - lb) - (read(xa + i) - la), u = size_of(d);
                        vf va = read(ea + i), vb = read(eb + i);
                        pa += va * d;
                        pb += vb * d;
                        ua += va * u;
                        ub += vb * u;
                    }
                    under_a += added(pa);
                    under_b += added(pb);
                    size_a += added(ua);
                    size_b += added(ub);
                }
                found = {sum(under_b) * inverse[b] - left, left - sum(under_a) * inverse[a],
                         sum(size_a) * inverse[a] + sum(size_b) * inverse[b]};
            }
            double least = found.ba < found.ab ? found.ba : found.ab;
            if (!(found.apart >= 0 && found.apart <= SURE * least && least >= SURE_KL)) {
                const float *ea = space + a * padded, *eb = space + b * padded;
                const double* of = shifts[p].is_rounded() ? lse : exact;
                found = near(shifts[p], rows, t->vocab, of[b] - of[a], ea, eb, inverse[a], inverse[b], other, own);
            }
            t->ba[p * t->rows + row] = found.ba;
            t->ab[p * t->rows + row] = found.ab;
            t->apart[p * t->rows + row] = found.apart;
        }
    }
}

struct Residual {
    const float* const* states;    // [blocks, states]: [rows of the block, stride] each
    const float* const* previous;  // [blocks, previous]
    const int64_t *strides, *previous_strides;
    const int64_t* starts;         // [blocks + 1]: where each block's rows begin; the last: all rows
    int64_t size, rows;            // numbers in a row; rows of all blocks
    int32_t n_states, n_previous, n_turns, n_pairs;
    const int32_t *turns, *pairs;  // [turns, 2]: of a previous state and of a state; [pairs, 2]: of states
    double *norm;                  // [states, rows]
    double *delta, *turned;        // [turns, rows]
    double *distance, *difference; // [pairs, rows]
};

// Rows first..last of the statistics of residual states, in float64 from the states' own values: capture/statistics.py.
// States, previous states: 16 at most.
void residual_rows(const Residual* t, int64_t first, int64_t last) {
    int64_t block = 0;
    for (int64_t row = first; row < last; row++) {
        while (row >= t->starts[block + 1]) block++;
        const int64_t own = row - t->starts[block], of = block * t->n_states, before_of = block * t->n_previous;
        const float *states[16], *previous[16];
        double norms[16], before[16];
        for (int s = 0; s < t->n_states; s++) {
            states[s] = t->states[of + s] + own * t->strides[of + s];
            norms[s] = norm(states[s], t->size);
            t->norm[s * t->rows + row] = norms[s];
        }
        for (int s = 0; s < t->n_previous; s++) {
            previous[s] = t->previous[before_of + s] + own * t->previous_strides[before_of + s];
            before[s] = norm(previous[s], t->size);
        }
        for (int i = 0; i < t->n_turns; i++) {
            int a = t->turns[2 * i], b = t->turns[2 * i + 1];
            t->delta[i * t->rows + row] = norms[b] - before[a];
            t->turned[i * t->rows + row] = apart(previous[a], before[a], states[b], norms[b], t->size).turned;
        }
        for (int i = 0; i < t->n_pairs; i++) {
            int a = t->pairs[2 * i], b = t->pairs[2 * i + 1];
            Apart found = apart(states[a], norms[a], states[b], norms[b], t->size);
            t->distance[i * t->rows + row] = found.turned;
            t->difference[i * t->rows + row] = found.far;
        }
    }
}

}  // extern "C"
