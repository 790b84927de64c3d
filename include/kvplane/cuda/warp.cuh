// kvplane/cuda/warp.cuh: one lane's numbers, and what lanes do together: the instructions that C++ has no
// words for.
//
// Nothing else here contains assembly. Compute capability 8.0 and later; copies of whole tiles by one
// instruction from 9.0 on.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace kvplane::cuda {

/// A warp as tile_math.cuh takes it; one object a lane, without content.
struct DeviceWarp {
    using Word = std::uint32_t;
    using Int = std::int32_t;
    using Float = float;
    using Flag = bool;

    __device__ static Word lane() { return threadIdx.x & 31u; }

    // Memory: `at` bytes behind a base.
    __device__ static void load16(const std::byte* base, Word at, Word (&to)[4]) {
        const uint4 words = *reinterpret_cast<const uint4*>(base + at);
        to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
    }
    __device__ static void load8(const std::byte* base, Word at, Word (&to)[2]) {
        const uint2 words = *reinterpret_cast<const uint2*>(base + at);
        to[0] = words.x, to[1] = words.y;
    }
    __device__ static Word load4(const std::byte* base, Word at) {
        return *reinterpret_cast<const std::uint32_t*>(base + at);
    }
    __device__ static Word load2(const std::byte* base, Word at) {
        return *reinterpret_cast<const std::uint16_t*>(base + at);
    }
    __device__ static Word load1(const std::byte* base, Word at) {
        return *reinterpret_cast<const std::uint8_t*>(base + at);
    }
    __device__ static void store16(std::byte* base, Word at, const Word (&from)[4]) {
        *reinterpret_cast<uint4*>(base + at) = make_uint4(from[0], from[1], from[2], from[3]);
    }
    __device__ static void store8(std::byte* base, Word at, Word first, Word second) {
        *reinterpret_cast<uint2*>(base + at) = make_uint2(first, second);
    }
    __device__ static void store4(std::byte* base, Word at, Word word) {
        *reinterpret_cast<std::uint32_t*>(base + at) = word;
    }
    __device__ static void store4(std::byte* base, Word at, Word word, Flag there) {
        if (there) store4(base, at, word);
    }
    __device__ static void store2(std::byte* base, Word at, Word word) {
        *reinterpret_cast<std::uint16_t*>(base + at) = static_cast<std::uint16_t>(word);
    }
    __device__ static Float load_bias(const float* bias, Word row, Int key, Flag there) {
        return there ? bias[row + static_cast<std::uint32_t>(key)] : 0.0f;
    }

    // Numbers.
    __device__ static Float as_float(Word x) { return __uint_as_float(x); }
    __device__ static Word as_word(Float x) { return __float_as_uint(x); }
    __device__ static Float low_half(Word x) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(x)));
    }
    __device__ static Float high_half(Word x) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(x >> 16)));
    }
    __device__ static Word pack_halves(Float low, Float high) {
        const __half2 halves = __floats2half2_rn(low, high);
        return *reinterpret_cast<const std::uint32_t*>(&halves);
    }
    template <std::uint32_t selector>
    __device__ static Word permute(Word a, Word b) {
        return __byte_perm(a, b, selector);
    }
    __device__ static Float to_float(Int x) { return __int2float_rn(x); }
    __device__ static Int to_int(Word x) { return static_cast<Int>(x); }
    __device__ static Float multiply_add(Float a, Float b, Float c) { return __fmaf_rn(a, b, c); }
    __device__ static Float maximum(Float a, Float b) { return fmaxf(a, b); }
    __device__ static Word minimum(Word a, Word b) { return min(a, b); }
    __device__ static Word count_bits(Word x) { return static_cast<Word>(__popc(x)); }
    __device__ static Float absolute(Float x) { return fabsf(x); }
    __device__ static Float exp2(Float x) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    /// Cosine and sine of x / 2^32 of a turn.
    __device__ static Float cosine(Word x) { return __cosf(turn_angle(x)); }
    __device__ static Float sine(Word x) { return __sinf(turn_angle(x)); }
    /// The upper half of the product.
    __device__ static Word multiply_high(Word a, Word b) { return __umulhi(a, b); }
    __device__ static Float tanh(Float x) { return tanhf(x); }
    template <class T>
    __device__ static T select(Flag flag, T yes, T no) {
        return flag ? yes : no;
    }
    __device__ static Flag both(Flag a, Flag b) { return a && b; }
    __device__ static Flag either(Flag a, Flag b) { return a || b; }

    // Lanes together.
    /// Until all lanes are here, and see what others have stored.
    __device__ static void sync() { __syncwarp(); }
    __device__ static Flag any(Flag flag) { return __any_sync(~0u, flag); }
    __device__ static Float of_lane(Float x, int lane) { return __shfl_sync(~0u, x, lane); }
    __device__ static Float shuffle_xor(Float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }

    // sums += A B, of 16 x 32 signed or unsigned bytes by 32 x 8 unsigned ones.
    __device__ static void multiply_signed(Int (&sums)[4], const Word (&a)[4], const Word (&b)[2]) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    __device__ static void multiply_unsigned(Int (&sums)[4], const Word (&a)[4], const Word (&b)[2]) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    // Of 16 x 16 by 16 x 8 fp16 numbers, into floats.
    __device__ static void multiply_halves(Float (&sums)[4], const Word (&a)[4], Word b0, Word b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

  private:
    __device__ static Float turn_angle(Word x) {
        return __int2float_rn(static_cast<Int>(x)) * 1.46291808e-9f;  // 2 pi / 2^32
    }
};

/// Copies of tiles into the memory of a block, one warp's slot each. A slot is filled by fill(), waited for
/// by wait(), and free again when release() has returned. A slot's uses go in turns.
class TileSlot {
  public:
    __device__ void begin(std::byte* data, std::uint64_t* barrier) {
        data_ = data;
        barrier_ = static_cast<std::uint32_t>(__cvta_generic_to_shared(barrier));
#if __CUDA_ARCH__ >= 900
        if (DeviceWarp::lane() == 0)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier_) : "memory");
#endif
    }
    /// After all slots of the block have begun.
    __device__ static void begun() {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
        __syncwarp();
    }

    /// Starts to copy `bytes` bytes, a multiple of 16.
    __device__ void fill(const std::byte* from, std::uint32_t bytes) {
        const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(data_));
#if __CUDA_ARCH__ >= 900
        if (DeviceWarp::lane() == 0) {
            // Read once: the second level of the cache need not keep it.
            std::uint64_t policy;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier_), "r"(bytes)
                         : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                "[%1], %2, [%3], %4;" ::"r"(to),
                "l"(from), "r"(bytes), "r"(barrier_), "l"(policy)
                : "memory");
        }
#else
        for (std::uint32_t at = DeviceWarp::lane() * 16u; at < bytes; at += 512u)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at)
                         : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    /// Nothing is copied in this turn: what wait() counts goes on.
    __device__ static void skip() {
#if __CUDA_ARCH__ < 900
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    /// Whether wait() counts what has begun behind a copy.
    __device__ static constexpr bool counts() {
#if __CUDA_ARCH__ >= 900
        return false;
#else
        return true;
#endif
    }
    /// Until the copy is there. On 8.x `behind` copies, or turns in which nothing is copied, have begun
    /// behind it at least.
    template <int behind = 1>
    __device__ const std::byte* wait() {
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra "
            "AGAIN;\n}\n" ::"r"(barrier_),
            "r"(turn_)
            : "memory");
        turn_ ^= 1u;
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(behind) : "memory");
        __syncwarp();
#endif
        return data_;
    }

    __device__ const std::byte* data() const {
        return data_;
    }

  private:
    std::byte* data_ = nullptr;
    std::uint32_t barrier_ = 0, turn_ = 0;
};

}  // namespace kvplane::cuda
