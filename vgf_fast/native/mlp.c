/* Perceptrons at few rows on a CPU: an ensemble's values and action gradient, and the Euler steps of a velocity field.

   One call runs all layers in one team of threads. With few rows a product costs what reading its weights costs, so
   they are read where PyTorch keeps them, [in, out] row by row, forward and backward: no copy of them can go stale.
   The order of every sum is fixed and does not depend on the number of threads. Widths of hidden layers are multiples
   of 16. Shapes: B states, N particles, R = B N rows, E members, H hidden units, A action entries. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
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

/* E perceptrons of one shape, on [state, rest]. */
struct mlp {
  int64_t members, hidden, rest, out, activation;
  int64_t half;              /* whether weights are bfloat16; else they are float32, as vectors always are */
  int64_t first_stride;      /* entries between members of the first weight, which has rows for the state too */
  const int64_t *widths;     /* [hidden] */
  const void *const *weight; /* [hidden + 1] of [E, in, out], the first from the rest's first row on */
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

INLINE float weight_at(const void *base, int64_t index, int half) {
  if (!half) return ((const float *)base)[index];
  uint32_t wide = (uint32_t)((const uint16_t *)base)[index] << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
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

/* out [rows, 1 or 2 vectors] = init + a [rows, depth] w [depth, .]; row r of init is at init + (r0 + r) / repeat * ld. */
INLINE void forward_tile(int rows, int vectors, int half, float *out, int64_t ld, const float *a, int64_t lda,
                         const void *w, int64_t depth, const float *init, int64_t r0, int64_t repeat) {
  vec sum[12][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) sum[r][v] = load(init + (r0 + r) / repeat * ld + v * V);
  for (int64_t k = 0; k < depth; k++) {
    vec b[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) b[v] = load_weight(w, k * ld + v * V, half);
    const char *next = (const char *)w + (k + AHEAD) * ld * (half ? 2 : 4);
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

INLINE int rows_at_once(int64_t left) {
  static const int8_t sizes[] = {12, 10, 8, 6, 4, 3, 2, 1};
  for (int i = 0;; i++)
    if (sizes[i] <= left && sizes[i] <= ROWS_FORWARD) return sizes[i];
}

/* Columns [from, to) of out [R, ld] = init + a [R, depth] w [depth, ld]. */
INLINE void forward_columns(int half, float *out, int64_t ld, const float *a, int64_t lda, const void *w, int64_t depth,
                            const float *init, int64_t repeat, int64_t rows, int64_t from, int64_t to) {
  for (int64_t c = from; c < to;) {
    int vectors = c + 2 * V <= to ? 2 : 1;
    const void *at = (const char *)w + c * (half ? 2 : 4);
    for (int64_t r = 0; r < rows;) {
      int count = rows_at_once(rows - r);
#define TILE(n)                                                                                                        \
  case n:                                                                                                              \
    if (vectors == 2)                                                                                                  \
      forward_tile(n, 2, half, out + r * ld + c, ld, a + r * lda, lda, at, depth, init + c, r, repeat);               \
    else                                                                                                               \
      forward_tile(n, 1, half, out + r * ld + c, ld, a + r * lda, lda, at, depth, init + c, r, repeat);               \
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

struct span {
  int64_t from, to;
};

/* Items of `unit` entries each, over all members; thread t of T takes a run of them. */
static struct span share_of(int64_t items) {
  int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  return (struct span){items * thread / threads, items * (thread + 1) / threads};
}

/* This thread's part of `items` in each member, over members that are split in one run. */
static struct span within(struct span whole, int64_t member, int64_t items) {
  int64_t from = whole.from - member * items, to = whole.to - member * items;
  return (struct span){from < 0 ? 0 : from, to > items ? items : to};
}

static void product_forward(const struct mlp *net, int64_t layer, float *out, const float *a, int64_t lda,
                            int64_t a_member, int64_t depth, const float *init, int64_t init_member, int64_t repeat,
                            int64_t rows) {
  int64_t width = net->widths[layer], blocks = (width + 31) / 32, entry = net->half ? 2 : 4;
  int64_t stride = layer == 0 ? net->first_stride : depth * width;
  struct span mine = share_of(net->members * blocks);
  for (int64_t e = mine.from / blocks; e < net->members && e * blocks < mine.to; e++) {
    struct span part = within(mine, e, blocks);
    int64_t from = part.from * 32, to = part.to * 32 < width ? part.to * 32 : width;
    const void *w = (const char *)net->weight[layer] + e * stride * entry;
    float *to_member = out + e * rows * width;
    const float *from_member = a + e * a_member, *start = init + e * init_member;
    if (net->half)
      forward_columns(1, to_member, width, from_member, lda, w, depth, start, repeat, rows, from, to);
    else
      forward_columns(0, to_member, width, from_member, lda, w, depth, start, repeat, rows, from, to);
  }
}

/* out [E, R, outputs] = g [E, R, width] w^T. */
static void product_backward(const struct mlp *net, int64_t layer, float *out, const float *g, int64_t outputs,
                             int64_t rows) {
  int64_t width = net->widths[layer], blocks = (outputs + 3) / 4, entry = net->half ? 2 : 4;
  int64_t stride = layer == 0 ? net->first_stride : outputs * width;
  struct span mine = share_of(net->members * blocks);
  for (int64_t e = mine.from / blocks; e < net->members && e * blocks < mine.to; e++) {
    struct span part = within(mine, e, blocks);
    int64_t from = part.from * 4, to = part.to * 4 < outputs ? part.to * 4 : outputs;
    const void *w = (const char *)net->weight[layer] + e * stride * entry;
    float *to_member = out + e * rows * outputs;
    const float *from_member = g + e * rows * width;
    if (net->half)
      backward_outputs(1, to_member, outputs, from_member, width, w, width, width, rows, from, to);
    else
      backward_outputs(0, to_member, outputs, from_member, width, w, width, width, rows, from, to);
  }
}

/* ---- rows ---- */

/* z [H] becomes what the backward pass needs (normalised, or z itself), h [H] the activation; returns 1 / deviation. */
INLINE float finish_row(float *z, float *h, int64_t width, const float *scale, const float *shift, int64_t kind,
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
      store(h + j, activate(x * load(scale + j) + load(shift + j), kind));
    }
  } else {
    for (int64_t j = 0; j < width; j += V) store(h + j, activate(load(z + j), kind));
  }
  return rstd;
}

/* Gradient of the activation [H] -> gradient of z, in place. */
INLINE void finish_row_backward(float *g, const float *x, float rstd, int64_t width, const float *scale,
                                const float *shift, int64_t kind) {
  if (!scale) {
    for (int64_t j = 0; j < width; j += V) store(g + j, activate_backward(load(g + j), load(x + j), kind));
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
  for (int64_t j = 0; j < width; j += V) store(g + j, (load(g + j) - mean - load(x + j) * slope) * rstd);
}

static void finish_rows(const struct mlp *net, int64_t layer, float *z, float *h, float *rstd, int64_t rows,
                        float eps) {
  int64_t width = net->widths[layer];
  struct span mine = share_of(net->members * rows);
  for (int64_t r = mine.from; r < mine.to; r++) {
    int64_t e = r / rows;
    const float *scale = net->scale ? net->scale[layer] + e * width : 0;
    const float *shift = net->scale ? net->shift[layer] + e * width : 0;
    float *zr = z + r * width, *hr = h + r * width;
    switch (net->activation) {
      case RELU: rstd[r] = finish_row(zr, hr, width, scale, shift, RELU, eps); break;
      case GELU: rstd[r] = finish_row(zr, hr, width, scale, shift, GELU, eps); break;
      default: rstd[r] = finish_row(zr, hr, width, scale, shift, SWISH, eps);
    }
  }
}

static void finish_rows_backward(const struct mlp *net, int64_t layer, float *g, const float *x, const float *rstd,
                                 int64_t rows) {
  int64_t width = net->widths[layer];
  struct span mine = share_of(net->members * rows);
  for (int64_t r = mine.from; r < mine.to; r++) {
    int64_t e = r / rows;
    const float *scale = net->scale ? net->scale[layer] + e * width : 0;
    const float *shift = net->scale ? net->shift[layer] + e * width : 0;
    float *gr = g + r * width;
    const float *xr = x + r * width;
    switch (net->activation) {
      case RELU: finish_row_backward(gr, xr, rstd[r], width, scale, shift, RELU); break;
      case GELU: finish_row_backward(gr, xr, rstd[r], width, scale, shift, GELU); break;
      default: finish_row_backward(gr, xr, rstd[r], width, scale, shift, SWISH);
    }
  }
}

/* ---- what Python calls ---- */

/* Floats of workspace that the calls below need for R rows of B states. */
int64_t vgf_workspace(const struct mlp *net, int64_t states, int64_t rows) {
  int64_t all = 0, most = 0;
  for (int64_t i = 0; i < net->hidden; i++) {
    all += net->widths[i];
    most = net->widths[i] > most ? net->widths[i] : most;
  }
  int64_t a_row = all + net->hidden + 2 * most + net->rest + 1 + net->out;
  return net->members * rows * a_row + most * (net->out + states);
}

/* Memory of a call. */
struct memory {
  float *saved[MOST_LAYERS]; /* [E, R, H] of each layer: z, then what its backward pass needs */
  float *rstd[MOST_LAYERS];  /* [E, R] */
  float *one, *two;          /* [E, R, H] each, for what flows through the layers */
  float *rest;
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
  memory.rest = at + 2 * all * most;
  return memory;
}

/* From the rest's rows [R, depth] to the last activation, in memory->one. Ends without a barrier: a thread may go on
   with its own rows. */
static void forward(const struct mlp *net, const struct memory *memory, const float *rest, int64_t depth,
                    const float *share, int64_t states, int64_t particles, float eps) {
  int64_t rows = states * particles;
  product_forward(net, 0, memory->saved[0], rest, depth, 0, depth, share, states * net->widths[0], particles, rows);
  for (int64_t i = 0; i < net->hidden; i++) {
    int64_t width = net->widths[i];
#pragma omp barrier
    finish_rows(net, i, memory->saved[i], memory->one, memory->rstd[i], rows, eps);
    if (i + 1 == net->hidden) break;
#pragma omp barrier
    product_forward(net, i + 1, memory->saved[i + 1], memory->one, width, rows * width, width, net->bias[i + 1],
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

/* Values q [E, R] where q is not null, and where score is not null the gradient [R, A] of their mean or minimum with
   respect to the actions [R, A]. share [E, B, H]: the state's share of the first layer, bias included. */
void vgf_critic(const struct mlp *net, const float *share, const float *actions, int64_t states, int64_t particles,
                int64_t minimum, float *q, float *score, float *workspace, float eps, int64_t threads) {
  int64_t rows = states * particles, members = net->members, hidden = net->hidden, all = members * rows;
  int64_t last = net->widths[hidden - 1], depth = net->rest;
  const struct memory memory = divide(net, rows, workspace);
  float *parts = memory.rest, *values = q ? q : parts + all * depth;
#pragma omp parallel num_threads((int)threads)
  {
    const void *head = net->weight[hidden];
    const struct span mine = share_of(all);
    float *from = memory.one, *to = memory.two;
    forward(net, &memory, actions, depth, share, states, particles, eps);
    if (q || minimum)
      for (int64_t r = mine.from; r < mine.to; r++) {
        int64_t e = r / rows;
        vec total = {0};
        for (int64_t j = 0; j < last; j += V) total += load(from + r * last + j) * load_weight(head, e * last + j, net->half);
        values[r] = sum(total) + net->bias[hidden][e];
      }
    if (score) {
#pragma omp barrier
      for (int64_t r = mine.from; r < mine.to; r++) {
        int64_t e = r / rows;
        float part = minimum ? (float)(smallest(values, members, rows, r % rows) == e) : 1.0f / (float)members;
        for (int64_t j = 0; j < last; j += V) store(from + r * last + j, load_weight(head, e * last + j, net->half) * part);
      }
      for (int64_t i = hidden - 1; i >= 0; i--) {
        finish_rows_backward(net, i, from, memory.saved[i], memory.rstd[i], rows);
#pragma omp barrier
        product_backward(net, i, i > 0 ? to : parts, from, i > 0 ? net->widths[i - 1] : depth, rows);
#pragma omp barrier
        float *swap = from;
        from = to;
        to = swap;
      }
      struct span entries = share_of(rows * depth);
      for (int64_t j = entries.from; j < entries.to; j++) {
        float total = parts[j];
        for (int64_t e = 1; e < members; e++) total += parts[e * rows * depth + j];
        score[j] = total;
      }
    }
  }
}

/* Euler steps x <- x + v(s, x, k / steps) / steps on x [R, A], then the clip to [-1, 1]. share [B, H] as above. */
void vgf_behavior_flow(const struct mlp *net, const float *share, float *x, int64_t states, int64_t particles,
                       int64_t steps, float *workspace, float eps, int64_t threads) {
  int64_t rows = states * particles, hidden = net->hidden, out = net->out;
  int64_t first = net->widths[0], last = net->widths[hidden - 1];
  const struct memory memory = divide(net, rows, workspace);
  float *head = memory.rest, *at_time = head + out * last;
  for (int64_t j = 0; j < last; j++)
    for (int64_t a = 0; a < out; a++) head[a * last + j] = weight_at(net->weight[hidden], j * out + a, net->half);
#pragma omp parallel num_threads((int)threads)
  {
    const struct span mine = share_of(rows), shares = share_of(states * (first / V));
    for (int64_t k = 0; k < steps; k++) {
      float time = (float)((double)k / (double)steps);
      for (int64_t j = shares.from; j < shares.to; j++)
        store(at_time + j * V, load(share + j * V) + time * load_weight(net->weight[0], out * first + j % (first / V) * V, net->half));
#pragma omp barrier
      forward(net, &memory, x, out, at_time, states, particles, eps);
      const float *h = memory.one + mine.from * last;
      float *v = memory.two + mine.from * out, *moved = x + mine.from * out;
      backward_outputs(0, v, out, h, last, head, last, last, mine.to - mine.from, 0, out);
      for (int64_t j = 0; j < (mine.to - mine.from) * out; j++) {
        moved[j] += (v[j] + net->bias[hidden][j % out]) * (float)(1.0 / (double)steps);
        if (k + 1 == steps) moved[j] = moved[j] < -1.0f ? -1.0f : moved[j] > 1.0f ? 1.0f : moved[j];
      }
      /* The next step's first product reads every row of x, behind the barrier above. */
    }
  }
}
