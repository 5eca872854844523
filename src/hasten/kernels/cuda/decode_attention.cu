// Decode attention over the paged KV cache: one token of each row, up to 8 query heads a key head.
//
// A cluster of CTAs serves one row and key head. Warps take blocks of 16 positions in turn and keep the
// online softmax in registers. Scores are K (16 positions) times q (8 heads), the sum is Vt (16 dimensions)
// times P (8 heads): the order of dimensions and positions inside a product is free, so every thread reads
// 16 contiguous bytes of a cache row. Each thread copies what it will need itself, STAGES blocks ahead, into
// shared memory: warps never wait for each other in the loop. Partial results then meet in shared memory,
// those of the cluster's CTAs by stores into each other's.
//
// Launched with programmatic stream serialization. With EARLY the first blocks are on their way while the
// kernel before still computes qkv; qkv is read, and anything written, only after griddepcontrol.wait.
// The token's own key and value come from qkv and are written to the cache, where nobody reads them here.
//
// Compiled by NVRTC with: IS_HALF (0: bf16, 1: fp16), NUM_KV_HEADS, GROUP, HEAD_DIM, CLUSTER, WARPS,
// STAGES, HAS_NORM, EARLY.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Params {
    const u16* qkv;           // [rows, (NUM_KV_HEADS * GROUP + 2 * NUM_KV_HEADS) * HEAD_DIM]
    const float* cos;         // [positions, HEAD_DIM / 2]
    const float* sin;
    u16* keys;                // [blocks, 16, NUM_KV_HEADS, HEAD_DIM]
    u16* values;
    const int* block_tables;  // [slots, table_stride]
    const int* slots;         // [rows]
    const int* positions;     // [rows], -1: a padding row
    const u16* q_norm;        // [HEAD_DIM], if HAS_NORM
    const u16* k_norm;
    u16* out;                 // [rows, NUM_KV_HEADS * GROUP * HEAD_DIM]
    u64 table_stride;
    float eps, scale;         // scale: times log2(e)
    int window;
};

constexpr int BLOCK = 16;
constexpr int HALF = HEAD_DIM / 2;
constexpr int K_CHUNKS = (HEAD_DIM + 31) / 32;  // of 8 dimensions for each thread of a quad
constexpr int V_CHUNKS = (HEAD_DIM + 63) / 64;  // of 8 dimensions for each quad
constexpr int ROW = NUM_KV_HEADS * HEAD_DIM;    // elements from one position of the cache to the next
constexpr int QUADS = GROUP * HEAD_DIM / 4;     // results in units of four
constexpr int SLICE = (QUADS + CLUSTER - 1) / CLUSTER;
constexpr float NONE = -1e30f;                  // maximum of no scores
static_assert(GROUP <= 8 && HEAD_DIM % 16 == 0 && HEAD_DIM <= 128, "shapes that the fragments cover");

constexpr int COPIES = 2 * K_CHUNKS + 4 * V_CHUNKS;  // of 16 bytes, by each thread for a block
static_assert(32 * COPIES * STAGES >= QUADS, "a warp's result fits in its ring");

struct Shared {  // shared_bytes has its size
    float4 ring[WARPS][STAGES][COPIES][32];  // at the end, a warp's result is in its ring
    float4 slices[CLUSTER][SLICE];           // of each CTA of the cluster, this CTA's slice
    float2 softmax[WARPS][8];                // maximum and total
    float2 cluster_softmax[CLUSTER][8];
};

struct Fragment {
    u32 x[4];
};

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void copy(float4* to, const u16* from, bool is_seen) {  // zeros if it is not
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = is_seen ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory"); }

__device__ __forceinline__ Fragment copied(const float4* p) {
    float4 x = *p;
    return {{__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)}};
}

__device__ __forceinline__ Fragment load_now(const u16* p, bool is_seen) {  // what this stream's kernels wrote
    Fragment y = {{0, 0, 0, 0}};
    if (is_seen)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(y.x[0]), "=r"(y.x[1]), "=r"(y.x[2]), "=r"(y.x[3]) : "l"(p) : "memory");
    return y;
}

__device__ __forceinline__ void store(u16* p, const Fragment& y) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(y.x[0]), "r"(y.x[1]), "r"(y.x[2]), "r"(y.x[3])
                 : "memory");
}

__device__ __forceinline__ float2 unpack(u32 x) {
    float2 y;
    if (IS_HALF)
        asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(y.x), "=f"(y.y) : "r"(x));
    else
        y = make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    if (IS_HALF)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float2 rounded(float x, float y) { return unpack(pack(x, y)); }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (IS_HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 transpose(u32 x) {  // of an 8x8 matrix of 16-bit elements in a warp
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ u32 in_cta(const void* p, int rank) {  // the same shared variable of another CTA
    u32 y;
    u32 own = (u32)__cvta_generic_to_shared(p);
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"(own), "r"(rank));
    return y;
}

// Dimensions 32c + 8 * (thread of the quad) of heads, those they are paired with, and their angles.
struct Angles {
    float4 cos[K_CHUNKS][2], sin[K_CHUNKS][2];

    __device__ __forceinline__ void load(const Params& params, int position, int thread) {
#pragma unroll
        for (int c = 0; c < K_CHUNKS; c++) {
            int dim = 32 * c + 8 * thread, pair = dim < HALF ? dim : dim - HALF;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u64 at = (u64)position * HALF + pair + 4 * i;
                cos[c][i] = dim < HEAD_DIM ? *(const float4*)(params.cos + at) : make_float4(0, 0, 0, 0);
                sin[c][i] = dim < HEAD_DIM ? *(const float4*)(params.sin + at) : make_float4(0, 0, 0, 0);
            }
        }
    }
};

struct Head {
    Fragment own[K_CHUNKS], partner[K_CHUNKS];

    __device__ __forceinline__ void load(const u16* head, int thread, bool is_seen) {
#pragma unroll
        for (int c = 0; c < K_CHUNKS; c++) {
            int dim = 32 * c + 8 * thread;
            own[c] = load_now(head + dim, is_seen && dim < HEAD_DIM);
            partner[c] = load_now(head + (dim < HALF ? dim + HALF : dim - HALF), is_seen && dim < HEAD_DIM);
        }
    }

    // RMSNorm's factor; the head is spread over a quad's threads.
    __device__ __forceinline__ float norm_factor(float eps) {
        float squares = 0.0f;
#pragma unroll
        for (int c = 0; c < K_CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = unpack(own[c].x[i]);
                squares += x.x * x.x + x.y * x.y;
            }
        squares += __shfl_xor_sync(~0u, squares, 1);
        squares += __shfl_xor_sync(~0u, squares, 2);
        return rsqrtf(squares / HEAD_DIM + eps);
    }

    // Normalized if HAS_NORM and rotated, rounded at every step as transformers does.
    __device__ __forceinline__ void rotate(Fragment (&y)[K_CHUNKS], const Angles& angles, const Head& weight, float eps, int thread) {
        float factor = HAS_NORM ? norm_factor(eps) : 1.0f;
#pragma unroll
        for (int c = 0; c < K_CHUNKS; c++) {
            float sign = 32 * c + 8 * thread < HALF ? -1.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = unpack(own[c].x[i]), z = unpack(partner[c].x[i]);
                if (HAS_NORM) {
                    float2 a = unpack(weight.own[c].x[i]), b = unpack(weight.partner[c].x[i]);
                    x = rounded(x.x * factor, x.y * factor);
                    z = rounded(z.x * factor, z.y * factor);
                    x = rounded(x.x * a.x, x.y * a.y);
                    z = rounded(z.x * b.x, z.y * b.y);
                }
                float4 cos = angles.cos[c][i / 2], sin = angles.sin[c][i / 2];
                float2 co = i & 1 ? make_float2(cos.z, cos.w) : make_float2(cos.x, cos.y);
                float2 si = i & 1 ? make_float2(sin.z, sin.w) : make_float2(sin.x, sin.y);
                x = rounded(x.x * co.x, x.y * co.y);
                z = rounded(z.x * sign * si.x, z.y * sign * si.y);
                y[c].x[i] = pack(x.x + z.x, x.y + z.y);
            }
        }
    }
};

// The online softmax of one warp. Thread (quad r, thread t of it) has heads 2t and 2t + 1.
struct Attention {
    float maximum[2] = {NONE, NONE};
    float total[2] = {0.0f, 0.0f};         // of this thread's positions
    float sums[4 * V_CHUNKS][4] = {};      // dimensions 64v + 8r + 2w + {0, 1}: [4v + w][0 and 1, 2 and 3]

    __device__ __forceinline__ void score(float (&scores)[4], const Fragment (&q)[K_CHUNKS], const Fragment (&k)[2][K_CHUNKS]) {
        float other[4] = {};
#pragma unroll
        for (int c = 0; c < K_CHUNKS; c++) {
            multiply(scores, k[0][c].x[0], k[1][c].x[0], k[0][c].x[1], k[1][c].x[1], q[c].x[0], q[c].x[1]);
            multiply(other, k[0][c].x[2], k[1][c].x[2], k[0][c].x[3], k[1][c].x[3], q[c].x[2], q[c].x[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) scores[i] += other[i];
    }

    // Positions r (is_seen[0]) and r + 8; leaves the weights as the operand of the second product.
    __device__ __forceinline__ void weigh(u32 (&weights)[2], float (&scores)[4], float scale, bool is_low, bool is_high) {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = (i < 2 ? is_low : is_high) ? scores[i] * scale : NONE;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = fmaxf(p[h], p[h + 2]);
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, mask));
            float new_maximum = fmaxf(maximum[h], largest);
            float decay = exp2_fast(maximum[h] - new_maximum);
            p[h] = exp2_fast(p[h] - new_maximum);
            p[h + 2] = exp2_fast(p[h + 2] - new_maximum);
            total[h] = total[h] * decay + p[h] + p[h + 2];
            maximum[h] = new_maximum;
#pragma unroll
            for (int i = 0; i < 4 * V_CHUNKS; i++) {
                sums[i][h] *= decay;
                sums[i][h + 2] *= decay;
            }
        }
        weights[0] = transpose(pack(p[0], p[1]));
        weights[1] = transpose(pack(p[2], p[3]));
    }

    // v: positions 2t, 2t + 1, 2t + 8, 2t + 9.
    __device__ __forceinline__ void add(const u32 (&weights)[2], const Fragment (&v)[4][V_CHUNKS]) {
#pragma unroll
        for (int c = 0; c < V_CHUNKS; c++)
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 low0 = __byte_perm(v[0][c].x[w], v[1][c].x[w], 0x5410), high0 = __byte_perm(v[0][c].x[w], v[1][c].x[w], 0x7632);
                u32 low1 = __byte_perm(v[2][c].x[w], v[3][c].x[w], 0x5410), high1 = __byte_perm(v[2][c].x[w], v[3][c].x[w], 0x7632);
                multiply(sums[4 * c + w], low0, high0, low1, high1, weights[0], weights[1]);
            }
    }
};

__device__ __forceinline__ void write(u16* out, int quad, float4 sum, float total) {
    float factor = 1.0f / total;
    u64 packed = pack(sum.x * factor, sum.y * factor) | (u64)pack(sum.z * factor, sum.w * factor) << 32;
    *(u64*)(out + 4 * quad) = packed;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, WARPS < 8 ? (HAS_NORM ? 8 : 16) / WARPS : 1)
decode_attention(const __grid_constant__ Params params) {
    extern __shared__ float4 memory[];
    Shared& shared = *(Shared*)memory;
    asm volatile("griddepcontrol.launch_dependents;");
    if (!EARLY) wait_for_previous_kernel();
    if (CLUSTER > 1) cluster_arrive();  // by the second barrier all CTAs have started
    const int rank = blockIdx.x % CLUSTER, kv_head = blockIdx.x / CLUSTER % NUM_KV_HEADS, row = blockIdx.x / (CLUSTER * NUM_KV_HEADS);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, thread = lane % 4;
    const int position = params.positions[row], slot = params.slots[row];
    u16* out = params.out + ((u64)row * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM);
    if (position < 0) {
        if (CLUSTER > 1) cluster_wait();
        if (EARLY) wait_for_previous_kernel();
        if (rank == 0)
            for (int i = threadIdx.x; i < QUADS; i += 32 * WARPS) *(u64*)(out + 4 * i) = 0;
        return;
    }
    const int first = max(position - params.window + 1, 0);
    const int first_block = first / BLOCK, end_block = position > first ? (position + BLOCK - 1) / BLOCK : first_block;
    const int* table = params.block_tables + slot * params.table_stride;

    float4(*ring)[COPIES][32] = shared.ring[warp];
    auto copy_block = [&](int stage, int block, int id) {
        const u64 at_block = ((u64)id * BLOCK * NUM_KV_HEADS + kv_head) * HEAD_DIM;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int at = quad + 8 * h, where = block * BLOCK + at;
            bool is_seen = where >= first && where < position;
#pragma unroll
            for (int c = 0; c < K_CHUNKS; c++) {
                int dim = 32 * c + 8 * thread;
                copy(&ring[stage][h * K_CHUNKS + c][lane], params.keys + at_block + at * ROW + dim, is_seen && dim < HEAD_DIM);
            }
        }
#pragma unroll
        for (int p = 0; p < 4; p++) {
            int at = 2 * thread + (p & 1) + 8 * (p / 2), where = block * BLOCK + at;
            bool is_seen = where >= first && where < position;
#pragma unroll
            for (int c = 0; c < V_CHUNKS; c++) {
                int dim = 64 * c + 8 * quad;
                copy(&ring[stage][2 * K_CHUNKS + p * V_CHUNKS + c][lane], params.values + at_block + at * ROW + dim,
                     is_seen && dim < HEAD_DIM);
            }
        }
    };

    const int stride = CLUSTER * WARPS;
    int block = first_block + rank + CLUSTER * warp;
    const bool has_own = rank == CLUSTER - 1 && warp == WARPS - 1, has_work = block < end_block || has_own;
    int ids[STAGES + 1];
#pragma unroll
    for (int s = 0; s <= STAGES; s++) ids[s] = block + s * stride < end_block ? table[block + s * stride] : 0;
    int next_id = ids[STAGES];
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (block + s * stride < end_block) copy_block(s, block + s * stride, ids[s]);
        end_copies();
    }
    Angles angles;
    if (has_work) angles.load(params, position, thread);
    const int own_block = has_own ? table[position / BLOCK] : 0;
    if (EARLY) wait_for_previous_kernel();

    Attention attention;
    if (has_work) {
        const u16* source = params.qkv + (u64)row * ((GROUP + 2) * ROW);
        Fragment q[K_CHUNKS];
        Head head;
        head.load(source + (kv_head * GROUP + quad) * HEAD_DIM, thread, quad < GROUP);
        if (has_own) {  // its loads are on their way with those of q
            Fragment own_k[2][K_CHUNKS] = {}, own_v[4][V_CHUNKS] = {};
            Head own_head;
            source += GROUP * ROW + kv_head * HEAD_DIM;
            own_head.load(source, thread, true);
#pragma unroll
            for (int c = 0; c < V_CHUNKS; c++) {
                int dim = 64 * c + 8 * quad;
                own_v[0][c] = load_now(source + ROW + dim, thread == 0 && dim < HEAD_DIM);
            }
            Head q_norm, k_norm;
            if (HAS_NORM) q_norm.load(params.q_norm, thread, true), k_norm.load(params.k_norm, thread, true);
            head.rotate(q, angles, q_norm, params.eps, thread);
            own_head.rotate(own_k[0], angles, k_norm, params.eps, thread);
            const u64 cell = ((u64)own_block * BLOCK + position % BLOCK) * ROW + kv_head * HEAD_DIM;
#pragma unroll
            for (int c = 0; c < K_CHUNKS; c++) {
                int dim = 32 * c + 8 * thread;
                if (quad == 0 && dim < HEAD_DIM) store(params.keys + cell + dim, own_k[0][c]);
            }
#pragma unroll
            for (int c = 0; c < V_CHUNKS; c++) {
                int dim = 64 * c + 8 * quad;
                if (thread == 0 && dim < HEAD_DIM) store(params.values + cell + dim, own_v[0][c]);
            }
            float scores[4] = {};
            u32 weights[2];
            attention.score(scores, q, own_k);
            attention.weigh(weights, scores, params.scale, quad == 0, false);
            attention.add(weights, own_v);
        } else {
            Head q_norm;
            if (HAS_NORM) q_norm.load(params.q_norm, thread, true);
            head.rotate(q, angles, q_norm, params.eps, thread);
        }
        for (int stage = 0; block < end_block; block += stride) {
            wait_for_copies();
            const int low = block * BLOCK + quad, high = low + 8;
            Fragment k[2][K_CHUNKS], v[4][V_CHUNKS];
            float scores[4] = {};
            u32 weights[2];
#pragma unroll
            for (int i = 0; i < 2 * K_CHUNKS; i++) k[i / K_CHUNKS][i % K_CHUNKS] = copied(&ring[stage][i][lane]);
#pragma unroll
            for (int i = 0; i < 4 * V_CHUNKS; i++) v[i / V_CHUNKS][i % V_CHUNKS] = copied(&ring[stage][2 * K_CHUNKS + i][lane]);
            attention.score(scores, q, k);
            attention.weigh(weights, scores, params.scale, low >= first && low < position, high >= first && high < position);
            attention.add(weights, v);
            const int later = block + STAGES * stride, id = next_id;
            if (later + stride < end_block) next_id = table[later + stride];
            if (later < end_block) copy_block(stage, later, id);
            end_copies();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int head = 2 * thread + h;
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) attention.total[h] += __shfl_xor_sync(~0u, attention.total[h], mask);
            if (head < GROUP) {
                if (quad == 0) shared.softmax[warp][head] = make_float2(attention.maximum[h], attention.total[h]);
                float* sums = (float*)ring + head * HEAD_DIM;
#pragma unroll
                for (int i = 0; i < 4 * V_CHUNKS; i++) {
                    int dim = 64 * (i / 4) + 8 * quad + 2 * (i % 4);
                    if (dim < HEAD_DIM) *(float2*)(sums + dim) = make_float2(attention.sums[i][h], attention.sums[i][h + 2]);
                }
            }
        }
    } else if (lane < 8) {
        shared.softmax[warp][lane] = make_float2(NONE, 0.0f);
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_wait();

    // the CTA's result, in units of four dimensions; a unit belongs to the CTA unit % CLUSTER
    for (int unit = threadIdx.x; unit < QUADS; unit += 32 * WARPS) {
        const int head = unit / (HEAD_DIM / 4);
        float maximum = NONE, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, shared.softmax[w][head].x);
        if (maximum == NONE) break;  // no warp of the CTA had a block
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 part = shared.softmax[w][head];
            if (part.x == NONE) continue;
            float weight = exp2_fast(part.x - maximum);
            float4 x = (&shared.ring[w][0][0][0])[unit];
            total += part.y * weight;
            sum.x += x.x * weight, sum.y += x.y * weight, sum.z += x.z * weight, sum.w += x.w * weight;
        }
        if (CLUSTER == 1) {
            write(out, unit, sum, total);
        } else {
            u32 there = in_cta(&shared.slices[rank][unit / CLUSTER], unit % CLUSTER);
            asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w) : "memory");
        }
    }
    if (CLUSTER == 1) return;
    for (int i = threadIdx.x; i < GROUP * CLUSTER; i += 32 * WARPS) {
        const int head = i % GROUP;
        float maximum = NONE, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, shared.softmax[w][head].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += shared.softmax[w][head].y * exp2_fast(shared.softmax[w][head].x - maximum);
        u32 there = in_cta(&shared.cluster_softmax[rank][head], i / GROUP);
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(maximum), "f"(total) : "memory");
    }
    cluster_arrive();
    cluster_wait();
    for (int i = threadIdx.x; i < SLICE; i += 32 * WARPS) {
        const int unit = i * CLUSTER + rank;
        if (unit >= QUADS) break;
        const int head = unit / (HEAD_DIM / 4);
        float maximum = NONE, total = 0.0f;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) maximum = fmaxf(maximum, shared.cluster_softmax[r][head].x);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            float2 part = shared.cluster_softmax[r][head];
            if (part.x == NONE) continue;
            float weight = exp2_fast(part.x - maximum);
            float4 x = shared.slices[r][i];
            total += part.y * weight;
            sum.x += x.x * weight, sum.y += x.y * weight, sum.z += x.z * weight, sum.w += x.w * weight;
        }
        write(out, unit, sum, total);
    }
}
