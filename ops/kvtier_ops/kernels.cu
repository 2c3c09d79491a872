// Copies of small fragments between device memory and the pinned pool, by a few blocks of threads.
//
// `gather` moves device -> pool, `scatter` pool -> device. The pool is host memory that the driver knows, so
// both sides are plain addresses. The grid walks over (row, piece): row r is descriptor r, piece p its p-th
// `piece_bytes`. Few blocks are enough to fill the link, and leave the other multiprocessors to compute.
//
// Bounds are checked before a descriptor is made (fragments.py); the kernel trusts what it is given.

struct Descriptor {
    unsigned long long device;
    unsigned long long pool;
    unsigned long long nbytes;
};

// Loads that each thread has under way before it stores: a read over the link takes a microsecond or two, and
// only bytes in flight hide that.
constexpr unsigned int UNROLL = 4;

template <typename Vector>
__device__ __forceinline__ void move_vectors(unsigned long long to, unsigned long long from,
                                             unsigned int nbytes) {
    const Vector* __restrict__ source = reinterpret_cast<const Vector*>(from);
    Vector* __restrict__ target = reinterpret_cast<Vector*>(to);
    const unsigned int count = nbytes / sizeof(Vector);
    for (unsigned int first = threadIdx.x; first < count; first += UNROLL * blockDim.x) {
        Vector held[UNROLL];
#pragma unroll
        for (unsigned int k = 0; k < UNROLL; ++k) {
            const unsigned int i = first + k * blockDim.x;
            if (i < count) held[k] = __ldcs(source + i);  // read once: not to push the model out of the caches
        }
#pragma unroll
        for (unsigned int k = 0; k < UNROLL; ++k) {
            const unsigned int i = first + k * blockDim.x;
            if (i < count) __stcs(target + i, held[k]);
        }
    }
}

__device__ __forceinline__ void move_piece(unsigned long long to, unsigned long long from,
                                           unsigned int nbytes) {
    const unsigned long long bits = to | from | nbytes;
    if ((bits & 15) == 0) {
        move_vectors<uint4>(to, from, nbytes);
    } else if ((bits & 7) == 0) {
        move_vectors<unsigned long long>(to, from, nbytes);
    } else if ((bits & 3) == 0) {
        move_vectors<unsigned int>(to, from, nbytes);
    } else {
        move_vectors<unsigned char>(to, from, nbytes);
    }
}

template <bool TO_POOL>
__device__ __forceinline__ void move_rows(const Descriptor* rows, unsigned int num_rows,
                                          unsigned int pieces_per_row, unsigned int piece_bytes) {
    const unsigned long long total = static_cast<unsigned long long>(num_rows) * pieces_per_row;
    for (unsigned long long item = blockIdx.x; item < total; item += gridDim.x) {
        const Descriptor row = rows[item / pieces_per_row];
        const unsigned long long begin = (item % pieces_per_row) * piece_bytes;
        if (begin >= row.nbytes) continue;  // a row shorter than the longest
        const unsigned long long left = row.nbytes - begin;
        const unsigned int nbytes = left < piece_bytes ? static_cast<unsigned int>(left) : piece_bytes;
        if (TO_POOL) {
            move_piece(row.pool + begin, row.device + begin, nbytes);
        } else {
            move_piece(row.device + begin, row.pool + begin, nbytes);
        }
    }
}

extern "C" __global__ void gather(const Descriptor* rows, unsigned int num_rows, unsigned int pieces_per_row,
                                  unsigned int piece_bytes) {
    move_rows<true>(rows, num_rows, pieces_per_row, piece_bytes);
}

extern "C" __global__ void scatter(const Descriptor* rows, unsigned int num_rows, unsigned int pieces_per_row,
                                   unsigned int piece_bytes) {
    move_rows<false>(rows, num_rows, pieces_per_row, piece_bytes);
}
