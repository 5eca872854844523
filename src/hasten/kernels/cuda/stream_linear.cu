// y = W @ x for 1 to 16 rows of x, bound by reading W once from memory.
//
// A cluster of CTAs owns tiles of 16 weight rows and splits their K between its CTAs. In a CTA
// one warp keeps a ring of shared-memory stages filled by the tensor copy engine, TEAMS teams of warps take
// stages in turn, the warps of a team split a stage's K and multiply on the tensor cores (weights are the
// 16-row operand, x the 8-column one), and four warps sum their partial results and write the output, a result a
// thread. Sums are taken in a fixed order: no atomics.
//
// Launched with programmatic stream serialization, a kernel starts while the one before it still runs
// and fills its ring with weights, which no kernel writes. x, the residual and the output are touched
// only after griddepcontrol.wait. Two CTAs share a multiprocessor if their shared memory allows it.
//
// A norm's factors come before the product, because transformers rounds there. So a kernel that adds a residual leaves
// the sums of squares of what it wrote, and the next one reads these while its x arrives.
//
// While weights stream, any other load waits behind them in the memory system. So scales, biases and norm
// weights are loaded before the wait, x in one go, residuals one tile ahead, and the copies in flight are
// limited to what the bandwidth needs; the rest of the ring is for the time between two kernels.
//
// The order in which K is summed is free, so each thread reads 16 contiguous bytes of a weight row and
// the elements of x that belong to them; the instruction's own element order never matters.
//
// One-byte weights are converted to x's type in registers, exactly.
//
// Compiled by NVRTC with: WEIGHT_KIND (0: as x, 1: int8, 2: float8_e4m3), X_HALF (0: bf16, 1: fp16), N_TILES
// (1: up to 8 rows, 2: up to 16), SEGMENT (bytes of a weight row in a stage), WARPS, TEAMS, FINISHERS (warps that finish
// tiles), PITCH (floats from one weight row's partial results to the next's), BARRIER_BYTES (for all barriers).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define UNROLL _Pragma("unroll")

struct alignas(64) Params {
    u64 map[16];            // tensor map of the weights: [128 bytes][num_weight_rows][k / 128 bytes], 8 rows a box
    const u8* x;            // [rows, k]
    const float* scale;     // [num_weight_rows], or null
    const u8* bias;         // [num_weight_rows], as x, or null
    const u8* norm_weight;  // [k], as x, or null: no norm
    const float* squares;   // [rows, parts], sums of squares of parts of x, or null
    const u8* residual;     // [rows, n], as x, or null; may be out
    void* out;              // [rows, n], as x or float
    float* out_squares;     // [rows, CTAs], sums of squares of what each CTA writes, or null
    int n, k, rows, tiles, parts;
    int own_tiles;          // at most so many tiles are written by one CTA
    int stages, in_flight;
    int slice;              // bytes of a weight row that one CTA of a cluster multiplies
    int gated, out_float;
    float eps;
};

constexpr int TILE_ROWS = 16;
constexpr int ELEMENT = WEIGHT_KIND == 0 ? 2 : 1;
constexpr int X_PER_BYTE = 2 / ELEMENT;        // bytes of x that one byte of a weight row meets
constexpr int STAGE = TILE_ROWS * SEGMENT;     // [8-row group][block][row][128 bytes, swizzled by row]
constexpr int GROUP = 8 * SEGMENT;
constexpr int BLOCK = 128;                     // bytes of a weight row in two rounds of products
constexpr int BLOCKS = SEGMENT / BLOCK;
constexpr int TEAM = WARPS / TEAMS;            // warps of a team
constexpr int BLOCKS_PER_WARP = BLOCKS / TEAM;
constexpr int RESULTS = FINISHERS * 32;        // of a tile, for 8 batch rows: one a thread
constexpr int PARTIAL = N_TILES * TILE_ROWS * PITCH * 4;  // bytes of one warp's partial results
constexpr int PEER_PARTIAL = N_TILES * RESULTS * 4;       // the same of one CTA of a cluster
constexpr int MAX_CLUSTER = 8;
constexpr int THREADS = (WARPS + 1 + FINISHERS) * 32;
static_assert(BLOCKS % TEAM == 0 && WARPS % TEAMS == 0, "a stage's blocks divide between a team's warps");
static_assert(RESULTS == TILE_ROWS * 8, "a finishing thread has a result of every 8 batch rows");

// shared memory: barriers, the norm's factors, two buffers of partial results, those of the cluster, scales,
// biases, norm weights, x, ring
constexpr int FULL = 0, EMPTY = 128, X_FULL = 256, PART_EMPTY = 264;
constexpr int PEER_FULL = 280, PEER_EMPTY = 296;  // PEER_EMPTY: [MAX_CLUSTER][2]
constexpr int FACTORS = BARRIER_BYTES, PARTIALS = FACTORS + 16 * 4;
static_assert(PEER_EMPTY + MAX_CLUSTER * 2 * 8 <= BARRIER_BYTES, "the last of the barriers");

// named barriers; 0 is that of __syncthreads
constexpr int FACTORS_FOUND = 1, X_NORMED = 2, SCALES_LOADED = 3, TILE_SUMMED = 4;
constexpr int PART_FULL = 5;  // one for each buffer

// Where things are for this CTA, and its part of K.
struct Place {
    u32 base, peer_slots, scales, biases, norm, x, ring;
    int rank, cluster, first_tile, tile_step;
    int begin, bytes, x_pitch;  // of a weight row: first byte, bytes; of x in shared memory
};

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_expect_only(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// Named barriers, for whole warps: every lane arrives for itself, so what it wrote is seen by all who waited.
template <int ID, int NUM_WARPS>
__device__ __forceinline__ void named_barrier_sync() {
    __syncwarp();
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(NUM_WARPS * 32) : "memory");
}
template <int ID, int NUM_WARPS>
__device__ __forceinline__ void named_barrier_arrive() {
    __syncwarp();
    asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(NUM_WARPS * 32) : "memory");
}
__device__ __forceinline__ u32 peer_address(u32 address, u32 rank) {
    u32 result;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
    return result;
}
__device__ __forceinline__ void barrier_arrive_peer(u32 peer_barrier) {
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, const u8* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_weights(u32 to, const Params& p, int row, int block, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;"
        ::"r"(to), "l"(p.map), "r"(0), "r"(row), "r"(block), "r"(barrier), "l"(policy) : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ float load_shared_float(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ void store_shared(u32 address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared_float(u32 address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
// Stores to another CTA of the cluster that its barrier counts, so that no fence is needed.
__device__ __forceinline__ void store_peer(u32 address, float v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                 ::"r"(address), "f"(v), "r"(barrier) : "memory");
}

// two elements of x in a word, and one element in memory
__device__ __forceinline__ float2 unpack(u32 pair) {
#if X_HALF
    float2 v;
    asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %2;\ncvt.f32.f16 %0, lo;\ncvt.f32.f16 %1, hi;\n}"
        : "=f"(v.x), "=f"(v.y) : "r"(pair));
    return v;
#else
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}
__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 pair;
#if X_HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
#endif
    return pair;
}
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 product;
#if X_HALF
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#endif
    return product;
}
__device__ __forceinline__ float rounded(float v) { return unpack(pack(v, 0.0f)).x; }
__device__ __forceinline__ float load_element(const u8* base, long long index) {
    return unpack(reinterpret_cast<const u16*>(base)[index]).x;
}
// What an earlier kernel wrote is read past the L1 cache.
__device__ __forceinline__ float load_activation(const u8* base, long long index) {
    return unpack(__ldcg(reinterpret_cast<const u16*>(base) + index)).x;
}

// Four one-byte weights to two words of two elements of x's type. Exact: the low bits of a constant whose
// unit in the last place is one take the code, then the constant is subtracted.
__device__ __forceinline__ void widen(u32 codes, u32& first, u32& second) {
#if WEIGHT_KIND == 1 && X_HALF  // 0x6400 | u = 1024 + u, u = code + 128
    codes ^= 0x80808080u;
    first = __byte_perm(codes, 0x64646464u, 0x4140), second = __byte_perm(codes, 0x64646464u, 0x4342);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(first) : "r"(0x64806480u));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(second) : "r"(0x64806480u));
#elif WEIGHT_KIND == 1          // 0x4300 | low 7 bits = 128 + low, minus 128, or 256 where the code is negative
    first = __byte_perm(codes, 0x43434343u, 0x4140), second = __byte_perm(codes, 0x43434343u, 0x4342);
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(first) : "r"(first & 0xff7fff7fu), "r"(first & 0xff80ff80u));
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(second) : "r"(second & 0xff7fff7fu), "r"(second & 0xff80ff80u));
#elif WEIGHT_KIND == 2          // sign, exponent and mantissa in place; the product mends the exponent's offset
    first = __byte_perm(codes, 0, 0x1404), second = __byte_perm(codes, 0, 0x3424);
    constexpr int SHIFT = X_HALF ? 1 : 4;
    first = (first & 0x80008000u) | ((first & 0x7f007f00u) >> SHIFT);
    second = (second & 0x80008000u) | ((second & 0x7f007f00u) >> SHIFT);
#if X_HALF
    asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(first) : "r"(0x5c005c00u));
    asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(second) : "r"(0x5c005c00u));
#else
    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(first) : "r"(0x7b807b80u));
    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(second) : "r"(0x7b807b80u));
#endif
#endif
}

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if X_HALF
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two sets, so that a product rarely waits for the one before.
typedef float Sums[2][N_TILES][4];

// 16 bytes of the thread's two weight rows with the x that they meet.
__device__ __forceinline__ void multiply_round(Sums& sums, const uint4 (&w)[2], const uint4 (&x)[N_TILES][X_PER_BYTE]) {
    const u32 top[4] = {w[0].x, w[0].y, w[0].z, w[0].w};
    const u32 low[4] = {w[1].x, w[1].y, w[1].z, w[1].w};
#if WEIGHT_KIND == 0
    UNROLL for (int j = 0; j < 2; j++) {
        UNROLL for (int n = 0; n < N_TILES; n++) {
            const uint4 v = x[n][0];
            multiply(sums[j][n], top[2 * j], low[2 * j], top[2 * j + 1], low[2 * j + 1], j ? v.z : v.x, j ? v.w : v.y);
        }
    }
#else
    UNROLL for (int j = 0; j < 4; j++) {
        u32 a0, a1, a2, a3;
        widen(top[j], a0, a2);
        widen(low[j], a1, a3);
        UNROLL for (int n = 0; n < N_TILES; n++) {
            const uint4 v = x[n][j / 2];
            multiply(sums[j % 2][n], a0, a1, a2, a3, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
        }
    }
#endif
}

// One warp's blocks of a stage, in two rounds each. PART: the stage holds only `blocks` of them, K's end.
template <bool PART>
__device__ __forceinline__ void multiply_stage(Sums& sums, u32 stage, const u32 (&w_offset)[2],
        const u32 (&x_row)[N_TILES], const u32 (&x_offset)[2], int blocks, int warp) {
    UNROLL for (int i = 0; i < BLOCKS_PER_WARP; i++) {
        const int block = warp % TEAM + i * TEAM;
        if (PART && block >= blocks) break;
        uint4 w[2][2], x[2][N_TILES][X_PER_BYTE];
        UNROLL for (int round = 0; round < 2; round++) {
            w[round][0] = load_shared(stage + block * 8 * BLOCK + w_offset[round]);
            w[round][1] = load_shared(stage + GROUP + block * 8 * BLOCK + w_offset[round]);
            UNROLL for (int n = 0; n < N_TILES; n++)
                UNROLL for (int j = 0; j < X_PER_BYTE; j++)
                    x[round][n][j] = load_shared(x_row[n] + block * BLOCK * X_PER_BYTE + x_offset[round] + j * 16);
        }
        UNROLL for (int round = 0; round < 2; round++) multiply_round(sums, w[round], x[round]);
    }
}

// Row of the weights that row r of a tile holds; a gated tile is 8 gate and 8 up rows.
__device__ __forceinline__ int weight_row(const Params& p, int tile, int r) {
    if (!p.gated) return tile * TILE_ROWS + r;
    return tile * 8 + r % 8 + (r < 8 ? 0 : p.n);
}
// Column of the result that row r of a tile gives; p.n, none, for the up rows of a gated one.
__device__ __forceinline__ int output_column(const Params& p, int tile, int r) {
    if (!p.gated) return tile * TILE_ROWS + r;
    return r < 8 ? tile * 8 + r : p.n;
}

// The norm's factors of all rows: from parts' sums of squares that the kernel before this one left, or from x itself.
__device__ __forceinline__ void find_factors(const Params& p, const Place& at, int warp, int lane) {
    for (int row = warp; row < p.rows; row += WARPS) {
        float sum = 0;
        if (p.squares) {
            constexpr int LOADS = 5;  // in flight at a time: all that a GPU of up to 160 multiprocessors leaves
            for (int part0 = lane; part0 < p.parts; part0 += LOADS * 32) {
                float parts[LOADS];
                UNROLL for (int j = 0; j < LOADS; j++) {
                    const int part = part0 + j * 32;
                    parts[j] = part < p.parts ? __ldcg(p.squares + row * p.parts + part) : 0.0f;
                }
                UNROLL for (int j = 0; j < LOADS; j++) sum += parts[j];
            }
        } else {
#pragma unroll 4
            for (int e = lane * 8; e < p.k; e += 256) {
                const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p.x + ((long long)row * p.k + e) * 2));
                const u32 words[4] = {v.x, v.y, v.z, v.w};
                UNROLL for (int j = 0; j < 4; j++) {
                    const float2 f = unpack(words[j]);
                    sum += f.x * f.x + f.y * f.y;
                }
            }
        }
        UNROLL for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (lane == 0) store_shared_float(at.base + FACTORS + row * 4, rsqrtf(sum / p.k + p.eps));
    }
    named_barrier_sync<FACTORS_FOUND, WARPS + FINISHERS>();
}

// Normalizes this CTA's part of x, in shared memory; rounded before the norm's weights and after them.
__device__ __forceinline__ void norm_x(const Params& p, const Place& at, int warp, int lane) {
    constexpr int ROWS = 4;  // at a time, so that their latencies overlap
    const int count = at.bytes / ELEMENT;
    for (int row0 = 0; row0 < p.rows; row0 += ROWS) {
        float factors[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) factors[r] = load_shared_float(at.base + FACTORS + (row0 + r) * 4);
        for (int e = warp * 256 + lane * 8; e < count; e += WARPS * 256) {
            const uint4 norm = load_shared(at.norm + e * 2);
            const u32 norms[4] = {norm.x, norm.y, norm.z, norm.w};
            uint4 x[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++)
                if (row0 + r < p.rows) x[r] = load_shared(at.x + (row0 + r) * at.x_pitch + e * 2);
            UNROLL for (int r = 0; r < ROWS; r++) {
                if (row0 + r >= p.rows) continue;
                u32 words[4] = {x[r].x, x[r].y, x[r].z, x[r].w};
                UNROLL for (int j = 0; j < 4; j++) {
                    const float2 f = unpack(words[j]);
                    words[j] = multiply_pairs(pack(f.x * factors[r], f.y * factors[r]), norms[j]);
                }
                const u32 to = at.x + (row0 + r) * at.x_pitch + e * 2;
                store_shared(to, make_uint4(words[0], words[1], words[2], words[3]));
            }
        }
    }
    named_barrier_sync<X_NORMED, WARPS + FINISHERS>();
}

// Scales and biases of the tiles that this CTA writes, as floats: [own tile][tile row].
__device__ __forceinline__ void load_scales(const Params& p, const Place& at, int thread) {
    const int num_rows = p.gated ? 2 * p.n : p.n;
    for (int e = thread; e < p.own_tiles * TILE_ROWS; e += RESULTS) {
        const int tile = at.first_tile + (e / TILE_ROWS * at.cluster + at.rank) * at.tile_step;
        const int row = min(weight_row(p, tile, e % TILE_ROWS), num_rows - 1);
        if (p.scale) store_shared_float(at.scales + e * 4, p.scale[row]);
        if (p.bias) store_shared_float(at.biases + e * 4, load_element(p.bias, row));
    }
    named_barrier_sync<SCALES_LOADED, FINISHERS>();
}

// One finishing thread's results: weight row `row` of a tile for the batch rows `batch` and batch + 8.
struct Result {
    int thread, batch, row;
};

// The residual where this thread will write.
__device__ __forceinline__ void load_residual(const Params& p, int tile, const Result& own, float (&values)[N_TILES]) {
    const int column = output_column(p, tile, own.row);
    UNROLL for (int n = 0; n < N_TILES; n++) {
        const int batch = n * 8 + own.batch;
        values[n] = 0.0f;
        if (p.residual && tile < p.tiles && batch < p.rows && column < p.n)
            values[n] = load_activation(p.residual, (long long)batch * p.n + column);
    }
}

// Sums the partial results of the CTA's warps for its i-th tile, and frees their buffer. Every lane that wrote
// or read takes part in the hand-over: one lane arriving on an mbarrier for its warp, after __syncwarp, would be
// ordered as well, but racecheck does not follow that.
__device__ __forceinline__ void sum_warps(const Place& at, int i, const Result& own, float (&sum)[N_TILES]) {
    const int buffer = i & 1;
    if (buffer == 0) named_barrier_sync<PART_FULL, WARPS + FINISHERS>();
    else named_barrier_sync<PART_FULL + 1, WARPS + FINISHERS>();
    UNROLL for (int n = 0; n < N_TILES; n++) {
        const u32 address = at.base + PARTIALS + buffer * WARPS * PARTIAL
                            + ((n * TILE_ROWS + own.row) * PITCH + own.batch) * 4;
        sum[n] = load_shared_float(address);
        UNROLL for (int w = 1; w < WARPS; w++) sum[n] += load_shared_float(address + w * PARTIAL);
    }
    barrier_arrive(at.base + PART_EMPTY + buffer * 8);
}

// Sends a tile's sums to the CTA of the cluster that writes it, or there adds those of the others. Slots are handed
// back only if they will be used again, so that nobody reaches into the memory of a CTA that has ended.
__device__ __forceinline__ void sum_cluster(const Params& p, const Place& at, int tile, int i, const Result& own,
        float (&sum)[N_TILES]) {
    const int owner = i % at.cluster, slot = i / at.cluster & 1, round = i / at.cluster / 2;
    const u32 slots = at.peer_slots + slot * at.cluster * PEER_PARTIAL, full = at.base + PEER_FULL + slot * 8;
    if (at.rank != owner) {
        if (round > 0) barrier_wait_cluster(at.base + PEER_EMPTY + (owner * 2 + slot) * 8, (round - 1) & 1);
        UNROLL for (int n = 0; n < N_TILES; n++) {
            const u32 to = slots + at.rank * PEER_PARTIAL + (n * RESULTS + own.thread) * 4;
            store_peer(peer_address(to, owner), sum[n], peer_address(full, owner));
        }
        return;
    }
    barrier_wait_cluster(full, round & 1);
    for (int from = 0; from < at.cluster; from++) {
        if (from == at.rank) continue;
        UNROLL for (int n = 0; n < N_TILES; n++)
            sum[n] += load_shared_float(slots + from * PEER_PARTIAL + (n * RESULTS + own.thread) * 4);
    }
    if (tile + 2 * at.cluster * at.tile_step >= p.tiles) return;
    named_barrier_sync<TILE_SUMMED, FINISHERS>();
    if (own.thread == 0) barrier_expect(full, (at.cluster - 1) * PEER_PARTIAL);
    __syncwarp();
    if (own.thread < at.cluster && own.thread != at.rank)
        barrier_arrive_peer(peer_address(at.base + PEER_EMPTY + (at.rank * 2 + slot) * 8, own.thread));
}

// Scales, activates and adds to the sums of this CTA's own-th tile, rounded at every step as transformers does.
// Adds to each batch row's squares what it writes.
__device__ __forceinline__ void write_tile(const Params& p, const Place& at, int tile, int own_tile, const Result& own,
        const float (&sum)[N_TILES], const float (&residual)[N_TILES], float (&squares)[N_TILES]) {
    const int e = (own_tile * TILE_ROWS + own.row) * 4, column = output_column(p, tile, own.row);
    const float scale = p.scale ? load_shared_float(at.scales + e) : 1.0f;
    const float bias = p.bias ? load_shared_float(at.biases + e) : 0.0f;
    UNROLL for (int n = 0; n < N_TILES; n++) {
        const int batch = n * 8 + own.batch;
        const long long index = (long long)batch * p.n + column;
        float v = sum[n] * scale + bias;
        if (!p.out_float) v = rounded(v);
        if (p.gated) {
            const float up = __shfl_down_sync(~0u, v, 8);
            v = rounded(rounded(v / (1.0f + __expf(-v))) * up);
        }
        v += residual[n];
        if (batch < p.rows && column < p.n) {
            const u32 word = pack(v, 0.0f);
            if (p.out_float) static_cast<float*>(p.out)[index] = v;
            else static_cast<u16*>(p.out)[index] = (u16)word;
            squares[n] += unpack(word).x * unpack(word).x;
        }
    }
}

// The CTA's sums of squares, for the kernel behind this one.
__device__ __forceinline__ void write_squares(const Params& p, const Result& own, float (&squares)[N_TILES]) {
    UNROLL for (int n = 0; n < N_TILES; n++) {
        UNROLL for (int offset = 1; offset < TILE_ROWS; offset *= 2)
            squares[n] += __shfl_xor_sync(~0u, squares[n], offset);
        const int batch = n * 8 + own.batch;
        if (own.row == 0 && batch < p.rows) p.out_squares[batch * gridDim.x + blockIdx.x] = squares[n];
    }
}

// The finishing warps: they fetch all small operands, then sum and write tile after tile.
__device__ __forceinline__ void finish_tiles(const Params& p, const Place& at, int thread) {
    const Result own = {thread, thread / TILE_ROWS, thread % TILE_ROWS};
    const u32 x_full = at.base + X_FULL;
    const int x_bytes = at.bytes * X_PER_BYTE, x_begin = at.begin * X_PER_BYTE;
    if (p.norm_weight && thread == 0) {
        barrier_expect_only(x_full, x_bytes);
        bulk_copy(at.norm, p.norm_weight + x_begin, x_bytes, x_full);
    }
    if (p.scale || p.bias) load_scales(p, at, thread);

    asm volatile("griddepcontrol.wait;" ::: "memory");  // until the kernel before this one is done
    if (thread == 0) barrier_expect(x_full, x_bytes * p.rows);
    __syncwarp();
    if (thread < p.rows)
        bulk_copy(at.x + thread * at.x_pitch, p.x + (long long)thread * p.k * 2 + x_begin, x_bytes, x_full);
    float residual[N_TILES], squares[N_TILES] = {};
    load_residual(p, at.first_tile + at.rank * at.tile_step, own, residual);
    if (p.norm_weight) {  // nothing is to be done here until then; racecheck loses the first tile's hand-over without
        named_barrier_sync<FACTORS_FOUND, WARPS + FINISHERS>();
        named_barrier_sync<X_NORMED, WARPS + FINISHERS>();
    }

    int i = 0;
    for (int tile = at.first_tile; tile < p.tiles; tile += at.tile_step, i++) {
        float sum[N_TILES];
        sum_warps(at, i, own, sum);
        if (at.cluster > 1) sum_cluster(p, at, tile, i, own, sum);
        if (at.rank != i % at.cluster) continue;
        write_tile(p, at, tile, i / at.cluster, own, sum, residual, squares);
        if (p.residual) load_residual(p, tile + at.cluster * at.tile_step, own, residual);
    }
    if (p.out_squares) write_squares(p, own, squares);
}

// The producer warp's one thread: weights into the ring, stage after stage.
__device__ __forceinline__ void stream_weights(const Params& p, const Place& at) {
    u64 once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    const int segments = (at.bytes + SEGMENT - 1) / SEGMENT;
    int stage = 0, phase = 0, landed = 0, landed_phase = 0, filled = 0;
    for (int tile = at.first_tile; tile < p.tiles; tile += at.tile_step) {
        for (int s = 0; s < segments; s++, filled++) {
            if (filled >= p.in_flight) {
                barrier_wait(at.base + FULL + landed * 8, landed_phase);
                if (++landed == p.stages) landed = 0, landed_phase ^= 1;
            }
            if (filled >= p.stages) barrier_wait(at.base + EMPTY + stage * 8, phase ^ 1);
            const u32 full = at.base + FULL + stage * 8;
            barrier_expect(full, STAGE);  // rows and bytes past the end arrive as zeros
            UNROLL for (int group = 0; group < TILE_ROWS / 8; group++)
                copy_weights(at.ring + stage * STAGE + group * GROUP, p, weight_row(p, tile, group * 8),
                             at.begin / BLOCK + s * BLOCKS, full, once);
            if (++stage == p.stages) stage = 0, phase ^= 1;
        }
    }
}

// A consumer warp: its blocks of every stage, and at a tile's end its partial results.
__device__ __forceinline__ void multiply_tiles(const Params& p, const Place& at, int warp, int lane) {
    if (p.norm_weight) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        find_factors(p, at, warp, lane);
    }
    barrier_wait(at.base + X_FULL, 0);
    if (p.norm_weight) norm_x(p, at, warp, lane);
    // Of a block's eight 16-byte units thread t takes two; with the swizzle of the rows and the pitch of x
    // no two threads of a quarter warp meet in a bank.
    const int g = lane / 4, t = lane % 4, segments = (at.bytes + SEGMENT - 1) / SEGMENT;
    u32 x_row[N_TILES], w_offset[2], x_offset[2];
    UNROLL for (int n = 0; n < N_TILES; n++)  // rows past the last are computed from the last, and not written
        x_row[n] = at.x + min(n * 8 + g, p.rows - 1) * at.x_pitch;
    UNROLL for (int round = 0; round < 2; round++) {
        const int unit = 2 * t + (round ^ (t >> 1));
        w_offset[round] = g * BLOCK + ((unit ^ g) * 16);
        x_offset[round] = unit * 16 * X_PER_BYTE;
    }
    int stage = 0, phase = 0, i = 0, turn = warp / TEAM;
    for (int tile = at.first_tile; tile < p.tiles; tile += at.tile_step, i++) {
        Sums sums = {};
        for (int s = 0; s < segments; s++) {
            if (turn-- == 0) {
                turn = TEAMS - 1;
                const int blocks = (at.bytes - s * SEGMENT) / BLOCK;
                u32 x_segment[N_TILES];
                UNROLL for (int n = 0; n < N_TILES; n++) x_segment[n] = x_row[n] + s * SEGMENT * X_PER_BYTE;
                barrier_wait(at.base + FULL + stage * 8, phase);
                const u32 from = at.ring + stage * STAGE;
                if (blocks >= BLOCKS) multiply_stage<false>(sums, from, w_offset, x_segment, x_offset, blocks, warp);
                else multiply_stage<true>(sums, from, w_offset, x_segment, x_offset, blocks, warp);
                __syncwarp();
                if (lane == 0) barrier_arrive(at.base + EMPTY + stage * 8);
            }
            if (++stage == p.stages) stage = 0, phase ^= 1;
        }
        const int buffer = i & 1;
        if (i > 1) barrier_wait(at.base + PART_EMPTY + buffer * 8, (i / 2 - 1) & 1);
        UNROLL for (int n = 0; n < N_TILES; n++) {
            const float(&a)[4] = sums[0][n], (&b)[4] = sums[1][n];
            const u32 to = at.base + PARTIALS + (buffer * WARPS + warp) * PARTIAL
                           + ((n * TILE_ROWS + g) * PITCH + 2 * t) * 4;
            store_shared(to, make_float2(a[0] + b[0], a[1] + b[1]));
            store_shared(to + 8 * PITCH * 4, make_float2(a[2] + b[2], a[3] + b[3]));
        }
        if (buffer == 0) named_barrier_arrive<PART_FULL, WARPS + FINISHERS>();
        else named_barrier_arrive<PART_FULL + 1, WARPS + FINISHERS>();
    }
}

__device__ __forceinline__ void init_barriers(const Params& p, u32 base, int cluster) {
    for (int s = 0; s < p.stages; s++) {
        barrier_init(base + FULL + s * 8, 1);
        barrier_init(base + EMPTY + s * 8, TEAM);
    }
    barrier_init(base + X_FULL, 1);
    for (int b = 0; b < 2; b++) {
        barrier_init(base + PART_EMPTY + b * 8, RESULTS);
        barrier_init(base + PEER_FULL + b * 8, 1);
        for (int c = 0; c < cluster; c++) barrier_init(base + PEER_EMPTY + (c * 2 + b) * 8, 1);
    }
    if (cluster > 1)
        for (int b = 0; b < 2; b++) barrier_expect(base + PEER_FULL + b * 8, (cluster - 1) * PEER_PARTIAL);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) stream_linear(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 shared[];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Place at;
    at.base = (u32)__cvta_generic_to_shared(shared);
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(at.rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(at.cluster));
    at.first_tile = blockIdx.x / at.cluster, at.tile_step = gridDim.x / at.cluster;
    at.begin = at.rank * p.slice, at.bytes = min(p.slice, p.k * ELEMENT - at.begin);
    at.x_pitch = p.slice * X_PER_BYTE + (ELEMENT == 2 ? 64 : 16);
    at.peer_slots = at.base + PARTIALS + 2 * WARPS * PARTIAL;
    at.scales = at.peer_slots + (at.cluster > 1 ? 2 * at.cluster * PEER_PARTIAL : 0);
    at.biases = at.scales + (p.scale ? p.own_tiles * TILE_ROWS * 4 : 0);
    at.norm = at.biases + (p.bias ? p.own_tiles * TILE_ROWS * 4 : 0);
    at.x = at.norm + (p.norm_weight ? p.slice * X_PER_BYTE : 0);
    at.ring = (at.x + p.rows * at.x_pitch + 1023) / 1024 * 1024;

    if (threadIdx.x == 0) init_barriers(p, at.base, at.cluster);
    __syncthreads();
    if (at.cluster > 1) {
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
    if (warp == WARPS) {
        if (lane == 0) stream_weights(p, at);
    } else if (warp > WARPS) {
        finish_tiles(p, at, threadIdx.x - (WARPS + 1) * 32);
    } else {
        multiply_tiles(p, at, warp, lane);
    }
}
