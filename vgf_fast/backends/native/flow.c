/* The flows on a CPU: an ensemble's values and action gradient, a velocity field's Euler steps, and particles' own.

   One call runs all layers. Few rows are shared out by columns, in one team of threads, and the weights are read where
   PyTorch keeps them, [in, out] row by row, forward and backward. Many rows are shared out in chunks, each of which a
   thread takes through all layers while they stay in its cache, with weights that `vgf_pack` has laid out. Weights in
   bfloat16 then meet activations rounded to it, in the CPU's own products of that type; sums are float32 throughout.
   The order of every sum is fixed and does not depend on the number of threads. Widths of hidden layers are multiples
   of 16. Shapes: B states, N particles, R = B N rows, E members, H hidden units, A action entries. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define V 16
#define MANY_REGISTERS 1
#elif defined(__AVX__)
#define V 8
#define MANY_REGISTERS 0
#else
#define V 4
#if defined(__aarch64__)
#define MANY_REGISTERS 1
#else
#define MANY_REGISTERS 0
#endif
#endif
/* A tile's accumulators stay in registers: 12 x 2 of 32, or 6 x 2 of 16. */
#define ROWS_FORWARD (MANY_REGISTERS ? 12 : 6)
#define ROWS_BACKWARD (MANY_REGISTERS ? 6 : 3)
#define OUTPUTS_BACKWARD 4
#define AHEAD 16 /* rows of the weight that are fetched before they are needed */

typedef float vec __attribute__((vector_size(4 * V)));
typedef float vec_unaligned __attribute__((vector_size(4 * V), aligned(4)));
typedef int32_t veci __attribute__((vector_size(4 * V)));
typedef uint16_t vech __attribute__((vector_size(2 * V)));
typedef uint16_t vech_unaligned __attribute__((vector_size(2 * V), aligned(2)));
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_unaligned __attribute__((vector_size(16), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

enum { RELU, GELU, SWISH };
#define MOST_LAYERS 32
#define PANEL 32 /* columns that lie together in a packed weight */

/* E perceptrons of one shape, on [state, rest]. */
struct mlp {
  int64_t members, hidden, rest, out, activation;
  int64_t half;              /* whether weights are bfloat16; else they are float32, as vectors always are */
  int64_t first_stride;      /* entries between members of the first weight, which has rows for the state too */
  const int64_t *widths;     /* [hidden] */
  const void *const *weight; /* [hidden + 1] of [E, in, out], the first from the rest's first row on */
  const void *const *packed;     /* [hidden] of what vgf_pack wrote, the first not read; null without */
  const void *const *transposed; /* likewise, of the transposed weights */
  const float *const *bias;  /* [hidden + 1] of [E, out]; the first is in the states' share, and not read */
  const float *const *scale; /* [hidden] of [E, H], or null without LayerNorm */
  const float *const *shift;
};

/* ---- vectors ---- */

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec x) { *(vec_unaligned *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec load_weight(const void *base, int64_t index, int half) {
  if (!half) return load((const float *)base + index);
  vech narrow = *(const vech_unaligned *)((const uint16_t *)base + index);
  veci wide = __builtin_convertvector(narrow, veci) << 16;
  return (vec)wide;
}

/* Rounded to the nearest bfloat16, of two that are as near to the even one; NaN stays one. */
INLINE void store_narrow(uint16_t *p, vec x) {
  veci bits = (veci)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, broken = x != x;
  *(vech_unaligned *)p = __builtin_convertvector((rounded & ~broken) | (0x7fc0 & broken), vech);
}

INLINE vec4 quarter(vec x) {
  vec4 part[V / 4], sum;
  memcpy(part, &x, sizeof x);
  sum = part[0];
#if V == 8
  sum = part[0] + part[1];
#elif V == 16
  sum = (part[0] + part[2]) + (part[1] + part[3]);
#endif
  return sum;
}

INLINE vec4 sum_of_each(vec4 a, vec4 b, vec4 c, vec4 d) {
  vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

INLINE float sum(vec x) {
  vec4 q = quarter(x);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

/* exp(x) to 2 units in the last place; the argument is clipped to where the result is a normal number. NaN stays. */
INLINE vec exponential(vec x) {
  veci low = x < splat(-87.0f), high = x > splat(88.0f);
  x = (vec)(((veci)x & ~(low | high)) | ((veci)splat(-87.0f) & low) | ((veci)splat(88.0f) & high));
  /* Rounded to the nearest integer by adding and taking away 1.5 * 2^23. */
  vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = 1.9875691500e-4f + (vec){0};
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  veci power = ((veci)shifted - (veci)splat(12582912.0f) + 127) << 23;
  return p * (vec)power;
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

#define GELU_SCALE 0.7978845608028654f
#define GELU_CUBE 0.044715f

INLINE vec activate(vec y, int64_t kind) {
  if (kind == RELU) return (vec)((veci)y & ~(y < 0.0f)); /* NaN stays */
  if (kind == SWISH) return y * sigmoid(y);
  return y * sigmoid(2.0f * GELU_SCALE * (y + GELU_CUBE * y * y * y));
}

/* g times the activation's derivative at y. */
INLINE vec activate_backward(vec g, vec y, int64_t kind) {
  if (kind == RELU) return (vec)((veci)g & ~(y <= 0.0f));
  if (kind == SWISH) {
    vec s = sigmoid(y);
    return g * (s + y * s * (1.0f - s));
  }
  vec s = sigmoid(2.0f * GELU_SCALE * (y + GELU_CUBE * y * y * y));
  return g * (s + y * s * (1.0f - s) * (2.0f * GELU_SCALE) * (1.0f + 3.0f * GELU_CUBE * y * y));
}

/* ---- products ---- */

/* out [rows, 1 or 2 vectors] = a [rows, depth] w [depth, .], plus row (r0 + r) / repeat of init unless it is null. */
INLINE void forward_tile(int rows, int vectors, int half, float *out, int64_t ld, const float *a, int64_t lda,
                         const void *w, int64_t ldw, int64_t depth, const float *init, int64_t r0, int64_t repeat) {
  vec sum[12][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) sum[r][v] = init ? load(init + (r0 + r) / repeat * ld + v * V) : (vec){0};
  for (int64_t k = 0; k < depth; k++) {
    vec b[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) b[v] = load_weight(w, k * ldw + v * V, half);
    const char *next = (const char *)w + (k + AHEAD) * ldw * (half ? 2 : 4);
    __builtin_prefetch(next);
    if (!half) __builtin_prefetch(next + 64);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      vec x = splat(a[r * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) sum[r][v] += x * b[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) store(out + r * ld + v * V, sum[r][v]);
}

#ifdef __AVX512BF16__
/* The same in bfloat16: a [rows, depth], and w in pairs of rows, [depth / 2, columns, 2]. */
INLINE void narrow_tile(int rows, int vectors, float *out, int64_t ld, const uint16_t *a, const uint16_t *w,
                        int64_t ldw, int64_t depth, const float *init) {
  __m512 sum[12][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) sum[r][v] = init ? _mm512_loadu_ps(init + v * V) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh b[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) b[v] = (__m512bh)_mm512_loadu_si512(w + k * ldw + 2 * v * V);
    __builtin_prefetch(w + (k + AHEAD) * ldw);
    __builtin_prefetch(w + (k + AHEAD) * ldw + 32);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      int32_t pair;
      memcpy(&pair, a + r * depth + k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, b[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) _mm512_storeu_ps(out + r * ld + v * V, sum[r][v]);
}
#endif

INLINE int rows_at_once(int64_t left) {
  static const int8_t sizes[] = {12, 10, 8, 6, 4, 3, 2, 1};
  for (int i = 0;; i++)
    if (sizes[i] <= left && sizes[i] <= ROWS_FORWARD) return sizes[i];
}

/* Columns [from, to) of out [R, ld] = a [R, depth] w [depth, ld], plus init as above. packed: w is as vgf_pack writes. */
INLINE void forward_columns(int half, int packed, float *out, int64_t ld, const float *a, int64_t lda, const void *w,
                            int64_t depth, const float *init, int64_t repeat, int64_t rows, int64_t from, int64_t to) {
  for (int64_t c = from; c < to;) {
    int vectors = c + 2 * V <= to ? 2 : 1;
    int64_t panel = c / PANEL * PANEL;
    int64_t ldw = !packed ? ld : ld - panel < PANEL ? ld - panel : PANEL;
    const void *at = (const char *)w + (packed ? panel * depth + (c - panel) : c) * (half ? 2 : 4);
    const float *start = init ? init + c : 0;
    for (int64_t r = 0; r < rows;) {
      int count = rows_at_once(rows - r);
#define TILE(n)                                                                                                        \
  case n:                                                                                                              \
    if (vectors == 2)                                                                                                  \
      forward_tile(n, 2, half, out + r * ld + c, ld, a + r * lda, lda, at, ldw, depth, start, r, repeat);              \
    else                                                                                                               \
      forward_tile(n, 1, half, out + r * ld + c, ld, a + r * lda, lda, at, ldw, depth, start, r, repeat);              \
    break;
      switch (count) {
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
        TILE(6)
        TILE(8)
        TILE(10)
        TILE(12)
      }
#undef TILE
      r += count;
    }
    c += vectors * V;
  }
}

/* out [R, ld] = a [R, depth] w, plus init [ld] unless it is null; a and w bfloat16, w as vgf_pack writes it. */
static void narrow_product(float *out, int64_t ld, const uint16_t *a, const uint16_t *w, int64_t depth,
                           const float *init, int64_t rows) {
#ifdef __AVX512BF16__
  for (int64_t c = 0; c < ld;) {
    int vectors = c + 2 * V <= ld ? 2 : 1;
    int64_t ldw = ld - c < PANEL ? ld - c : PANEL;
    for (int64_t r = 0; r < rows;) {
      int count = rows_at_once(rows - r);
#define TILE(n)                                                                                                        \
  case n:                                                                                                              \
    if (vectors == 2)                                                                                                  \
      narrow_tile(n, 2, out + r * ld + c, ld, a + r * depth, w + c * depth, ldw, depth, init ? init + c : 0);          \
    else                                                                                                               \
      narrow_tile(n, 1, out + r * ld + c, ld, a + r * depth, w + c * depth, ldw, depth, init ? init + c : 0);          \
    break;
      switch (count) {
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
        TILE(6)
        TILE(8)
        TILE(10)
        TILE(12)
      }
#undef TILE
      r += count;
    }
    c += vectors * V;
  }
#else
  (void)out, (void)ld, (void)a, (void)w, (void)depth, (void)init, (void)rows;
#endif
}

/* out [rows, outputs <= 4] = g [rows, depth] w [outputs, depth]^T, depth a multiple of V. */
INLINE void backward_tile(int rows, int outputs, int half, float *out, int64_t ld, const float *g, int64_t ldg,
                          const void *w, int64_t depth, int64_t ldw) {
  vec sum[6][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int o = 0; o < 4; o++) sum[r][o] = (vec){0};
  for (int64_t j = 0; j < depth; j += V) {
    vec b[4];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
      b[o] = load_weight(w, o * ldw + j, half);
      __builtin_prefetch((const char *)w + ((o + 4) * ldw + j) * (half ? 2 : 4));
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      vec x = load(g + r * ldg + j);
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) sum[r][o] += x * b[o];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    vec4 each = sum_of_each(quarter(sum[r][0]), quarter(sum[r][1]), quarter(sum[r][2]), quarter(sum[r][3]));
    if (outputs == 4)
      *(vec4_unaligned *)(out + r * ld) = each;
    else
      for (int o = 0; o < outputs; o++) out[r * ld + o] = each[o];
  }
}

INLINE void backward_rows(int rows, int half, float *out, int64_t ld, const float *g, int64_t ldg, const void *w,
                          int64_t depth, int64_t ldw, int outputs) {
  switch (outputs) {
    case 4: backward_tile(rows, 4, half, out, ld, g, ldg, w, depth, ldw); break;
    case 3: backward_tile(rows, 3, half, out, ld, g, ldg, w, depth, ldw); break;
    case 2: backward_tile(rows, 2, half, out, ld, g, ldg, w, depth, ldw); break;
    default: backward_tile(rows, 1, half, out, ld, g, ldg, w, depth, ldw);
  }
}

/* Outputs [from, to) of out [R, ld] = g [R, depth] w [., depth]^T. */
INLINE void backward_outputs(int half, float *out, int64_t ld, const float *g, int64_t ldg, const void *w,
                             int64_t depth, int64_t ldw, int64_t rows, int64_t from, int64_t to) {
  for (int64_t o = from; o < to; o += OUTPUTS_BACKWARD) {
    int outputs = to - o < OUTPUTS_BACKWARD ? (int)(to - o) : OUTPUTS_BACKWARD;
    const void *at = (const char *)w + o * ldw * (half ? 2 : 4);
    int64_t tiles = (rows + ROWS_BACKWARD - 1) / ROWS_BACKWARD, r = 0;
    for (int64_t t = tiles; t > 0; t--) {
      int count = (int)((rows - r + t - 1) / t);
      float *to_row = out + r * ld + o;
      const float *g_row = g + r * ldg;
      switch (count) {
        case 1: backward_rows(1, half, to_row, ld, g_row, ldg, at, depth, ldw, outputs); break;
        case 2: backward_rows(2, half, to_row, ld, g_row, ldg, at, depth, ldw, outputs); break;
        case 3: backward_rows(3, half, to_row, ld, g_row, ldg, at, depth, ldw, outputs); break;
        case 4: backward_rows(4, half, to_row, ld, g_row, ldg, at, depth, ldw, outputs); break;
        case 5: backward_rows(5, half, to_row, ld, g_row, ldg, at, depth, ldw, outputs); break;
        default: backward_rows(6, half, to_row, ld, g_row, ldg, at, depth, ldw, outputs);
      }
      r += count;
    }
  }
}

/* ---- a team's share of a phase ---- */

/* Threads that go through the layers together. */
struct team {
  int64_t thread, threads;
};

struct span {
  int64_t from, to;
};

static struct span share_of(struct team team, int64_t items) {
  return (struct span){items * team.thread / team.threads, items * (team.thread + 1) / team.threads};
}

/* This thread's part of `items` in each member, over members that are split in one run. */
static struct span within(struct span whole, int64_t member, int64_t items) {
  int64_t from = whole.from - member * items, to = whole.to - member * items;
  return (struct span){from < 0 ? 0 : from, to > items ? items : to};
}

static inline void wait_for(struct team team) {
  if (team.threads > 1) {
#pragma omp barrier
  }
}

/* Whether the products of a layer past the first are in bfloat16; a team of one thread then runs them. */
static int is_narrow(const struct mlp *net) { return net->half && net->packed; }

/* out [E, R, H] = a [E or 1, R, depth] w, plus init; a is bfloat16 where the product is. */
static void product_forward(const struct mlp *net, struct team team, int64_t layer, float *out, const void *a,
                            int64_t a_member, int64_t depth, const float *init, int64_t init_member, int64_t repeat,
                            int64_t rows) {
  int64_t width = net->widths[layer], blocks = (width + PANEL - 1) / PANEL, entry = net->half ? 2 : 4;
  int64_t stride = layer == 0 ? net->first_stride : depth * width;
  int packed = layer > 0 && net->packed;
  const char *weight = packed ? (const char *)net->packed[layer] : (const char *)net->weight[layer];
  struct span mine = share_of(team, net->members * blocks);
  for (int64_t e = mine.from / blocks; e < net->members && e * blocks < mine.to; e++) {
    struct span part = within(mine, e, blocks);
    int64_t from = part.from * PANEL, to = part.to * PANEL < width ? part.to * PANEL : width;
    const void *w = weight + e * stride * entry;
    float *to_member = out + e * rows * width;
    const float *from_member = (const float *)a + e * a_member, *start = init + e * init_member;
    if (packed && net->half)
      narrow_product(to_member, width, (const uint16_t *)a + e * a_member, w, depth, start, rows);
    else if (packed)
      forward_columns(0, 1, to_member, width, from_member, depth, w, depth, start, repeat, rows, from, to);
    else if (net->half)
      forward_columns(1, 0, to_member, width, from_member, depth, w, depth, start, repeat, rows, from, to);
    else
      forward_columns(0, 0, to_member, width, from_member, depth, w, depth, start, repeat, rows, from, to);
  }
}

/* out [E, R, outputs] = g [E, R, width] w^T; g is bfloat16 where the product is. */
static void product_backward(const struct mlp *net, struct team team, int64_t layer, float *out, const void *g,
                             int64_t outputs, int64_t rows) {
  int packed = layer > 0 && net->transposed;
  int64_t unit = packed ? PANEL : OUTPUTS_BACKWARD;
  int64_t width = net->widths[layer], blocks = (outputs + unit - 1) / unit, entry = net->half ? 2 : 4;
  int64_t stride = layer == 0 ? net->first_stride : outputs * width;
  const char *weight = packed ? (const char *)net->transposed[layer] : (const char *)net->weight[layer];
  struct span mine = share_of(team, net->members * blocks);
  for (int64_t e = mine.from / blocks; e < net->members && e * blocks < mine.to; e++) {
    struct span part = within(mine, e, blocks);
    int64_t from = part.from * unit, to = part.to * unit < outputs ? part.to * unit : outputs;
    const void *w = weight + e * stride * entry;
    float *to_member = out + e * rows * outputs;
    const float *from_member = (const float *)g + e * rows * width;
    if (packed && net->half)
      narrow_product(to_member, outputs, (const uint16_t *)g + e * rows * width, w, width, 0, rows);
    else if (packed)
      forward_columns(0, 1, to_member, outputs, from_member, width, w, width, 0, rows, rows, from, to);
    else if (net->half)
      backward_outputs(1, to_member, outputs, from_member, width, w, width, width, rows, from, to);
    else
      backward_outputs(0, to_member, outputs, from_member, width, w, width, width, rows, from, to);
  }
}

/* ---- rows ---- */

/* z [H] becomes what the backward pass needs (normalised, or z itself), h [H] the activation, or where h is null
   narrow; returns 1 / deviation. */
INLINE float finish_row(float *z, float *h, uint16_t *narrow, int64_t width, const float *scale, const float *shift, int64_t kind,
                        float eps) {
  float rstd = 1.0f;
  if (scale) {
    vec total = {0}, squares = {0};
    for (int64_t j = 0; j < width; j += V) total += load(z + j);
    vec mean = splat(sum(total) / (float)width);
    for (int64_t j = 0; j < width; j += V) {
      vec d = load(z + j) - mean;
      squares += d * d;
    }
    rstd = 1.0f / sqrtf(sum(squares) / (float)width + eps);
    for (int64_t j = 0; j < width; j += V) {
      vec x = (load(z + j) - mean) * rstd;
      store(z + j, x);
      x = activate(x * load(scale + j) + load(shift + j), kind);
      if (h) store(h + j, x);
      else store_narrow(narrow + j, x);
    }
  } else {
    for (int64_t j = 0; j < width; j += V) {
      vec x = activate(load(z + j), kind);
      if (h) store(h + j, x);
      else store_narrow(narrow + j, x);
    }
  }
  return rstd;
}

/* Gradient g of the activation [H] -> gradient of z: in place, or where narrow is not null, there. */
INLINE void finish_row_backward(float *g, uint16_t *narrow, const float *x, float rstd, int64_t width, const float *scale,
                                const float *shift, int64_t kind) {
  if (!scale) {
    for (int64_t j = 0; j < width; j += V) {
      vec d = activate_backward(load(g + j), load(x + j), kind);
      if (narrow) store_narrow(narrow + j, d);
      else store(g + j, d);
    }
    return;
  }
  vec total = {0}, along = {0};
  for (int64_t j = 0; j < width; j += V) {
    vec xj = load(x + j), s = load(scale + j);
    vec d = activate_backward(load(g + j), xj * s + load(shift + j), kind) * s;
    store(g + j, d);
    total += d;
    along += d * xj;
  }
  vec mean = splat(sum(total) / (float)width), slope = splat(sum(along) / (float)width);
  for (int64_t j = 0; j < width; j += V) {
    vec d = (load(g + j) - mean - load(x + j) * slope) * rstd;
    if (narrow) store_narrow(narrow + j, d);
    else store(g + j, d);
  }
}

static void finish_rows(const struct mlp *net, struct team team, int64_t layer, float *z, float *h,
                        uint16_t *narrow, float *rstd, int64_t rows, float eps) {
  int64_t width = net->widths[layer];
  struct span mine = share_of(team, net->members * rows);
  for (int64_t r = mine.from; r < mine.to; r++) {
    int64_t e = r / rows;
    const float *scale = net->scale ? net->scale[layer] + e * width : 0;
    const float *shift = net->scale ? net->shift[layer] + e * width : 0;
    float *zr = z + r * width, *hr = h ? h + r * width : 0;
    uint16_t *nr = narrow + r * width;
    switch (net->activation) {
      case RELU: rstd[r] = finish_row(zr, hr, nr, width, scale, shift, RELU, eps); break;
      case GELU: rstd[r] = finish_row(zr, hr, nr, width, scale, shift, GELU, eps); break;
      default: rstd[r] = finish_row(zr, hr, nr, width, scale, shift, SWISH, eps);
    }
  }
}

static void finish_rows_backward(const struct mlp *net, struct team team, int64_t layer, float *g, uint16_t *narrow,
                                 const float *x, const float *rstd, int64_t rows) {
  int64_t width = net->widths[layer];
  struct span mine = share_of(team, net->members * rows);
  for (int64_t r = mine.from; r < mine.to; r++) {
    int64_t e = r / rows;
    const float *scale = net->scale ? net->scale[layer] + e * width : 0;
    const float *shift = net->scale ? net->shift[layer] + e * width : 0;
    float *gr = g + r * width;
    uint16_t *nr = narrow ? narrow + r * width : 0;
    const float *xr = x + r * width;
    switch (net->activation) {
      case RELU: finish_row_backward(gr, nr, xr, rstd[r], width, scale, shift, RELU); break;
      case GELU: finish_row_backward(gr, nr, xr, rstd[r], width, scale, shift, GELU); break;
      default: finish_row_backward(gr, nr, xr, rstd[r], width, scale, shift, SWISH);
    }
  }
}

/* ---- a network at the rows of a team ---- */

/* Floats that R rows of B states need. */
static int64_t floats(const struct mlp *net, int64_t states, int64_t rows) {
  int64_t all = 0, most = 0;
  for (int64_t i = 0; i < net->hidden; i++) {
    all += net->widths[i];
    most = net->widths[i] > most ? net->widths[i] : most;
  }
  int64_t a_row = all + net->hidden + 3 * most + net->rest + 1;
  return net->members * rows * a_row + states * most;
}

struct memory {
  float *saved[MOST_LAYERS]; /* [E, R, H] of each layer: z, then what its backward pass needs */
  float *rstd[MOST_LAYERS];  /* [E, R] */
  float *one, *two;          /* [E, R, H] each, for what flows through the layers */
  uint16_t *narrow;          /* [E, R, H] of it in bfloat16 */
  float *values;             /* [E, R] */
  float *parts;              /* [E, R, rest] */
  float *share;              /* [B, H] */
};

static struct memory divide(const struct mlp *net, int64_t rows, float *at) {
  struct memory memory;
  int64_t all = net->members * rows, most = 0;
  for (int64_t i = 0; i < net->hidden; i++) {
    most = net->widths[i] > most ? net->widths[i] : most;
    memory.saved[i] = at;
    memory.rstd[i] = at + all * net->widths[i];
    at = memory.rstd[i] + all;
  }
  memory.one = at;
  memory.two = at + all * most;
  memory.narrow = (uint16_t *)(at + 2 * all * most);
  memory.values = at + 3 * all * most;
  memory.parts = memory.values + all;
  memory.share = memory.parts + all * net->rest;
  return memory;
}

/* From the rest's rows [R, depth] to the last activation, in memory->one. Ends without a barrier: a thread may go on
   with its own rows. share [E, ., H], members share_member entries apart. */
static void forward(const struct mlp *net, struct team team, const struct memory *memory, const float *rest,
                    int64_t depth, const float *share, int64_t share_member, int64_t states, int64_t particles,
                    float eps) {
  int64_t rows = states * particles;
  product_forward(net, team, 0, memory->saved[0], rest, 0, depth, share, share_member, particles, rows);
  for (int64_t i = 0; i < net->hidden; i++) {
    int64_t width = net->widths[i];
    wait_for(team);
    int last = i + 1 == net->hidden;
    float *h = is_narrow(net) && !last ? 0 : memory->one;
    finish_rows(net, team, i, memory->saved[i], h, memory->narrow, memory->rstd[i], rows, eps);
    if (last) break;
    wait_for(team);
    const void *a = h ? (const void *)h : (const void *)memory->narrow;
    product_forward(net, team, i + 1, memory->saved[i + 1], a, rows * width, width, net->bias[i + 1],
                    net->widths[i + 1], rows, rows);
  }
}

/* The member whose value is smallest: the first of equals, and NaN before all, as PyTorch's argmin. */
static int64_t smallest(const float *values, int64_t members, int64_t rows, int64_t row) {
  int64_t found = 0;
  for (int64_t e = 1; e < members; e++) {
    float value = values[e * rows + row], best = values[found * rows + row];
    if (value < best || (value != value && best == best)) found = e;
  }
  return found;
}

static void critic(const struct mlp *net, struct team team, const float *share, int64_t share_member,
                   const float *actions, int64_t states, int64_t particles, int64_t minimum, float *q, int64_t q_member,
                   float *score, float *workspace, float eps) {
  int64_t rows = states * particles, members = net->members, hidden = net->hidden, all = members * rows;
  int64_t last = net->widths[hidden - 1], depth = net->rest;
  const struct memory memory = divide(net, rows, workspace);
  const void *head = net->weight[hidden];
  const struct span mine = share_of(team, all);
  float *from = memory.one, *to = memory.two;
  forward(net, team, &memory, actions, depth, share, share_member, states, particles, eps);
  if (q || minimum)
    for (int64_t r = mine.from; r < mine.to; r++) {
      int64_t e = r / rows;
      vec total = {0};
      for (int64_t j = 0; j < last; j += V)
        total += load(from + r * last + j) * load_weight(head, e * last + j, net->half);
      memory.values[r] = sum(total) + net->bias[hidden][e];
      if (q) q[e * q_member + r % rows] = memory.values[r];
    }
  if (!score) return;
  wait_for(team);
  for (int64_t r = mine.from; r < mine.to; r++) {
    int64_t e = r / rows;
    float part = minimum ? (float)(smallest(memory.values, members, rows, r % rows) == e) : 1.0f / (float)members;
    for (int64_t j = 0; j < last; j += V) store(from + r * last + j, load_weight(head, e * last + j, net->half) * part);
  }
  for (int64_t i = hidden - 1; i >= 0; i--) {
    uint16_t *narrow = is_narrow(net) && i > 0 ? memory.narrow : 0;
    finish_rows_backward(net, team, i, from, narrow, memory.saved[i], memory.rstd[i], rows);
    wait_for(team);
    const void *g = narrow ? (const void *)narrow : (const void *)from;
    product_backward(net, team, i, i > 0 ? to : memory.parts, g, i > 0 ? net->widths[i - 1] : depth, rows);
    wait_for(team);
    float *swap = from;
    from = to;
    to = swap;
  }
  struct span entries = share_of(team, rows * depth);
  for (int64_t j = entries.from; j < entries.to; j++) {
    float total = memory.parts[j];
    for (int64_t e = 1; e < members; e++) total += memory.parts[e * rows * depth + j];
    score[j] = total;
  }
}

/* head [A, H]: the last weight transposed. */
static void behavior_flow(const struct mlp *net, struct team team, const float *share, const float *head, float *x,
                          int64_t states, int64_t particles, int64_t steps, float *workspace, float eps) {
  int64_t rows = states * particles, hidden = net->hidden, out = net->out;
  int64_t first = net->widths[0], last = net->widths[hidden - 1], vectors = first / V;
  const struct memory memory = divide(net, rows, workspace);
  const struct span mine = share_of(team, rows), shares = share_of(team, states * vectors);
  for (int64_t k = 0; k < steps; k++) {
    float time = (float)((double)k / (double)steps);
    for (int64_t j = shares.from; j < shares.to; j++) {
      vec weight = load_weight(net->weight[0], out * first + j % vectors * V, net->half);
      store(memory.share + j * V, load(share + j * V) + time * weight);
    }
    wait_for(team);
    forward(net, team, &memory, x, out, memory.share, 0, states, particles, eps);
    const float *h = memory.one + mine.from * last;
    float *v = memory.two + mine.from * out, *moved = x + mine.from * out;
    backward_outputs(0, v, out, h, last, head, last, last, mine.to - mine.from, 0, out);
    for (int64_t j = 0; j < (mine.to - mine.from) * out; j++)
      moved[j] += (v[j] + net->bias[hidden][j % out]) * (float)(1.0 / (double)steps);
    /* The next step's first product reads every row of x, behind the barrier above. */
  }
  for (int64_t j = mine.from * out; j < mine.to * out; j++) x[j] = x[j] < -1.0f ? -1.0f : x[j] > 1.0f ? 1.0f : x[j];
}

/* ---- particles of a state ---- */

struct flow {
  int64_t particles, entries, step; /* N, A, and the step's number from 1 on */
  int64_t bandwidth_gradient, repulsion, adam, kernel; /* kernel 0: exp(-gamma D), 1: (1 + gamma D)^(-1/2) */
  float step_size, temperature, beta1, beta2, adam_eps, bandwidth_min, gamma_eps;
};

/* The entry of rank k, from 0 on, of n numbers, none of them NaN; leaves the smaller ones before place k. */
static float select_rank(float *values, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    float pivot = values[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (values[i] < pivot) i++;
      while (values[j] > pivot) j--;
      if (i <= j) {
        float swap = values[i];
        values[i++] = values[j];
        values[j--] = swap;
      }
    }
    if (k <= j) high = j;
    else if (k >= i) low = i;
    else break;
  }
  return values[k];
}

/* Place of the entry of rank k in a stable sort of n numbers, whose value it is. */
static int64_t place_of_rank(const float *values, int64_t n, int64_t k, float value) {
  for (int64_t i = 0; i < n; i++) k -= values[i] < value;
  for (int64_t i = 0;; i++)
    if (values[i] == value && k-- == 0) return i;
}

static int64_t flow_floats(const struct flow *flow) {
  int64_t n = flow->particles;
  return 2 * (n * n + V) + n * flow->entries;
}

/* phi [N, A], to be divided by N, of particles x [N, A] with score [N, A]. distances, kernel [N * N + V]. */
static void direction(const struct flow *flow, const float *x, const float *score, float *phi, float *distances,
                      float *kernel) {
  int64_t n = flow->particles, width = flow->entries, all = n * n;
  float broken = 0.0f;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) {
      float total = 0.0f;
      for (int64_t a = 0; a < width; a++) {
        float d = x[i * width + a] - x[j * width + a];
        total += d * d;
      }
      distances[i * n + j] = kernel[i * n + j] = total;
      broken += total - total;
    }
  if (broken != 0.0f) {
    /* Every particle of the state is pulled by every other one. */
    for (int64_t j = 0; j < n * width; j++) phi[j] = NAN;
    return;
  }
  int64_t lower = (all - 1) / 2, upper = all / 2;
  float first = select_rank(kernel, all, lower), second = first;
  if (upper > lower) {
    second = kernel[upper];
    for (int64_t j = upper + 1; j < all; j++) second = kernel[j] < second ? kernel[j] : second;
  }
  float spread = logf((float)n + 1.0f), h = (upper > lower ? 0.5f * (first + second) : first) / (2.0f * spread);
  float gamma = 1.0f / (flow->gamma_eps + 2.0f * (h > flow->bandwidth_min ? h : flow->bandwidth_min));
  /* -2 dK / dD is steep K or steep K^3. */
  float steep = flow->kernel ? gamma : 2.0f * gamma;
  double slope = 0.0; /* over up to 16,384 entries */
  if (flow->kernel)
    for (int64_t j = 0; j < all; j++) kernel[j] = 1.0f / sqrtf(1.0f + gamma * distances[j]);
  else
    for (int64_t j = 0; j < all; j += V) store(kernel + j, exponential(-gamma * load(distances + j)));
  for (int64_t j = 0; j < all; j++) slope += distances[j] * (flow->kernel ? kernel[j] * kernel[j] * kernel[j] : kernel[j]);
  slope *= h <= flow->bandwidth_min ? 0.0 : 0.5 * steep * gamma / spread;
  for (int64_t i = 0; i < n; i++) {
    float *to = phi + i * width, attraction = flow->repulsion ? 1.0f / flow->temperature : 1.0f;
    for (int64_t a = 0; a < width; a++) to[a] = 0.0f;
    for (int64_t j = 0; j < n; j++) {
      float k = kernel[i * n + j], pull = k * attraction;
      float push = flow->repulsion ? steep * (flow->kernel ? k * k * k : k) : 0.0f;
      for (int64_t a = 0; a < width; a++)
        to[a] += pull * score[j * width + a] + push * (x[i * width + a] - x[j * width + a]);
    }
  }
  if (flow->bandwidth_gradient && flow->repulsion)
    for (int64_t rank = lower; rank <= upper; rank++) {
      int64_t place = place_of_rank(distances, all, rank, rank == lower ? first : second);
      const float *one = x + place / n * width, *other = x + place % n * width;
      float part = (float)(-2.0 * slope / (double)(upper - lower + 1));
      for (int64_t a = 0; a < width; a++) phi[place / n * width + a] += part * (one[a] - other[a]);
    }
}

static void move(const struct flow *flow, float *x, const float *score, float *m, float *v, float *workspace) {
  int64_t n = flow->particles, count = n * flow->entries;
  float *distances = workspace, *kernel = distances + n * n + V, *phi = kernel + n * n + V;
  direction(flow, x, score, phi, distances, kernel);
  double left1 = 1.0 - pow(flow->beta1, (double)flow->step), left2 = 1.0 - pow(flow->beta2, (double)flow->step);
  float rate = (float)(flow->step_size / left1), unbias = (float)(1.0 / left2), share = 1.0f / (float)n;
  for (int64_t j = 0; j < count; j++) {
    float g = phi[j] * share, moved;
    if (flow->adam) {
      m[j] = flow->beta1 * m[j] + (1.0f - flow->beta1) * g;
      v[j] = flow->beta2 * v[j] + (1.0f - flow->beta2) * (g * g);
      moved = x[j] + rate * m[j] / (sqrtf(v[j] * unbias) + flow->adam_eps);
    } else
      moved = x[j] + flow->step_size * g;
    x[j] = moved < -1.0f ? -1.0f : moved > 1.0f ? 1.0f : moved;
  }
}

/* ---- what Python calls ---- */

/* Floats of workspace for a call with B states of N particles, in chunks of `chunk` states; 0: all together. */
int64_t vgf_workspace(const struct mlp *net, int64_t states, int64_t particles, int64_t chunk, int64_t threads) {
  return chunk ? threads * floats(net, chunk, chunk * particles) : floats(net, states, states * particles);
}

/* Whether products in bfloat16 are compiled in. */
int64_t vgf_has_bfloat16(void) {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

/* weights [E, in, out], or where transpose is set [E, out, in], -> packed [E, panels, in, columns],
   in bfloat16 [E, panels, in / 2, columns, 2]; a panel has 32 columns, the last one the rest. */
void vgf_pack(const void *weights, void *packed, int64_t members, int64_t in, int64_t out, int64_t transpose,
              int64_t half, int64_t threads) {
  int64_t panels = (out + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads((int)threads)
  for (int64_t job = 0; job < members * panels; job++) {
    int64_t c = job % panels * PANEL, width = out - c < PANEL ? out - c : PANEL, member = job / panels * in * out;
    int64_t along_in = transpose ? 1 : out, along_out = transpose ? in : 1;
    /* In squares, so that lines of the cache are used whole on both sides. */
    for (int64_t k0 = 0; k0 < in; k0 += 16)
      for (int64_t j = 0; j < width; j++)
        for (int64_t k = k0; k < k0 + 16; k++) {
          int64_t source = member + k * along_in + (c + j) * along_out, at = member + c * in;
          if (half)
            ((uint16_t *)packed)[at + (k / 2 * width + j) * 2 + k % 2] = ((const uint16_t *)weights)[source];
          else
            ((float *)packed)[at + k * width + j] = ((const float *)weights)[source];
        }
  }
}

/* Values q [E, R] where q is not null, and where score is not null the gradient [R, A] of their mean or minimum with
   respect to the actions [R, A]. share [E, B, H]: the state's share of the first layer, bias included. */
void vgf_critic(const struct mlp *net, const float *share, const float *actions, int64_t states, int64_t particles,
                int64_t minimum, float *q, float *score, float *workspace, float eps, int64_t chunk, int64_t threads) {
  int64_t rows = states * particles, first = net->widths[0];
  if (!chunk) {
#pragma omp parallel num_threads((int)threads)
    {
      struct team team = {omp_get_thread_num(), omp_get_num_threads()};
      critic(net, team, share, states * first, actions, states, particles, minimum, q, rows, score, workspace, eps);
    }
    return;
  }
  int64_t each = floats(net, chunk, chunk * particles);
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
  for (int64_t b = 0; b < states; b += chunk) {
    int64_t count = states - b < chunk ? states - b : chunk, r = b * particles;
    critic(net, (struct team){0, 1}, share + b * first, states * first, actions + r * net->rest, count, particles,
           minimum, q ? q + r : 0, rows, score ? score + r * net->rest : 0, workspace + omp_get_thread_num() * each, eps);
  }
}

/* Euler steps x <- x + v(s, x, k / steps) / steps on x [R, A], then the clip to [-1, 1]. share [B, H] as above,
   head [A, H] the last weight transposed. */
void vgf_behavior_flow(const struct mlp *net, const float *share, const float *head, float *x, int64_t states,
                       int64_t particles, int64_t steps, float *workspace, float eps, int64_t chunk, int64_t threads) {
  if (!chunk) {
#pragma omp parallel num_threads((int)threads)
    {
      struct team team = {omp_get_thread_num(), omp_get_num_threads()};
      behavior_flow(net, team, share, head, x, states, particles, steps, workspace, eps);
    }
    return;
  }
  int64_t each = floats(net, chunk, chunk * particles);
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
  for (int64_t b = 0; b < states; b += chunk) {
    int64_t count = states - b < chunk ? states - b : chunk;
    behavior_flow(net, (struct team){0, 1}, share + b * net->widths[0], head, x + b * particles * net->out, count,
                  particles, steps, workspace + omp_get_thread_num() * each, eps);
  }
}

/* Floats of workspace for the call below. */
int64_t vgf_flow_workspace(const struct flow *flow, int64_t threads) { return threads * flow_floats(flow); }

/* One step of particles x [B, N, A] along their direction, with Adam's moments m, v [B, N, A], or null for plain ascent;
   clipped to [-1, 1]. */
void vgf_flow_step(const struct flow *flow, float *x, const float *score, float *m, float *v, int64_t states,
                   float *workspace, int64_t threads) {
  int64_t count = flow->particles * flow->entries;
#pragma omp parallel for num_threads((int)threads)
  for (int64_t b = 0; b < states; b++)
    move(flow, x + b * count, score + b * count, flow->adam ? m + b * count : 0, flow->adam ? v + b * count : 0,
         workspace + omp_get_thread_num() * flow_floats(flow));
}

/* Floating-point operations in `rounds` rounds of products and sums of vectors that stay in registers, on every thread,
   in bfloat16 where half is set: what the CPU can do at most. 0 where it has no such products. */
double vgf_peak(int64_t rounds, int64_t half, int64_t threads) {
  enum { CHAINS = MANY_REGISTERS ? 24 : 12 };
  volatile float start = 1e-3f, sink = 0.0f;
#ifndef __AVX512BF16__
  if (half) return 0.0;
#endif
#pragma omp parallel num_threads((int)threads)
  {
    vec chains[CHAINS], x = splat(start), y = splat(start);
    for (int i = 0; i < CHAINS; i++) chains[i] = x * (float)i;
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS; i++) {
#ifdef __AVX512BF16__
        if (half)
          chains[i] = (vec)_mm512_dpbf16_ps((__m512)chains[i], (__m512bh)x, (__m512bh)y);
        else
#endif
          chains[i] = chains[i] * x + y;
      }
    float total = 0.0f;
    for (int i = 0; i < CHAINS; i++) total += sum(chains[i]);
#pragma omp critical
    sink = sink + total;
  }
  return (double)rounds * CHAINS * V * 2.0 * (half ? 2.0 : 1.0) * (double)threads;
}
