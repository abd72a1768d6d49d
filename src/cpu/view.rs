//! Reading tensors of any dtype and stride a row at a time as f32, and writing rows from many tasks at once.

use std::marker::PhantomData;

use candle_core::{CpuStorage, DType, Layout, Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

#[derive(Debug, Clone, Copy)]
enum Data<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// A tensor `[B, T, H, D]` or a tensor with fewer dimensions broadcast to that.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    data: Data<'a>,
    offset: usize,
    strides: [usize; 4],
}

impl<'a> View<'a> {
    /// `axes` says which of `[B, T, H, D]` each dimension of the layout is.
    pub fn new(storage: &'a CpuStorage, layout: &Layout, axes: &[usize]) -> Result<Self> {
        let data = match storage {
            CpuStorage::F32(x) => Data::F32(x),
            CpuStorage::F16(x) => Data::F16(x),
            CpuStorage::BF16(x) => Data::BF16(x),
            _ => bail!("a tensor is {:?}, it must be F32, F16 or BF16", storage),
        };
        let mut strides = [0; 4];
        for (&axis, &stride) in axes.iter().zip(layout.stride()) {
            strides[axis] = stride;
        }
        Ok(Self { data, offset: layout.start_offset(), strides })
    }

    /// Contiguous f32 values.
    pub fn of_slice(data: &'a [f32], [_, t, h, d]: [usize; 4]) -> Self {
        Self { data: Data::F32(data), offset: 0, strides: [t * h * d, h * d, d, 1] }
    }

    /// Contiguous f32 states `[N, HV, K, V]`, read a key row at a time.
    pub fn of_states(data: &'a [f32], [h, k, v]: [usize; 3]) -> Self {
        Self { data: Data::F32(data), offset: 0, strides: [h * k * v, v, k * v, 1] }
    }

    /// The same number everywhere; `value` holds it.
    pub fn constant(value: &'a [f32; 1]) -> Self {
        Self { data: Data::F32(value), offset: 0, strides: [0; 4] }
    }

    /// The dtype of the tensor.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
        }
    }

    /// The states with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        let [b, t, h, d] = self.strides;
        Self { strides: [b, d, h, t], ..self }
    }

    /// Token `t` of this is token `t + shift` of the tensor.
    pub fn later(self, shift: usize) -> Self {
        Self { offset: self.offset + shift * self.strides[1], ..self }
    }

    /// The rows of one batch entry and head, `d` elements from `from` on.
    pub fn rows(&self, batch: usize, head: usize, from: usize) -> Rows<'a> {
        let [b, t, h, d] = self.strides;
        let offset = self.offset + batch * b + head * h + from * d;
        Rows { data: self.data, offset, token: t, element: d }
    }
}

/// The rows of a [`View`] for one batch entry and head, indexed by token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    data: Data<'a>,
    offset: usize,
    token: usize,
    element: usize,
}

/// Asks for the cache lines of `len` elements. The rows of a head lie far apart, where no hardware prefetcher looks for
/// the next one.
#[inline(always)]
fn prefetch<T>(first: *const T, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..len * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.cast::<i8>().wrapping_add(offset)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (first, len);
}

impl Rows<'_> {
    /// The elements of token `t`: where they lie if they are f32 side by side, otherwise in `scratch`, as many as fit.
    #[inline(always)]
    pub fn read<'r>(&'r self, t: usize, scratch: &'r mut [f32]) -> &'r [f32] {
        match self.data {
            Data::F32(x) if self.element == 1 => &x[self.offset + t * self.token..][..scratch.len()],
            _ => {
                self.load(t, scratch);
                scratch
            }
        }
    }

    /// Says that the first `len` elements of token `t` will be loaded soon.
    #[inline(always)]
    pub fn prefetch(&self, t: usize, len: usize) {
        let at = self.offset + t * self.token;
        if self.element == 1 {
            match self.data {
                Data::F32(x) => prefetch(x.as_ptr().wrapping_add(at), len),
                Data::F16(x) => prefetch(x.as_ptr().wrapping_add(at), len),
                Data::BF16(x) => prefetch(x.as_ptr().wrapping_add(at), len),
            }
        }
    }

    /// Fills `row` with the elements of token `t`.
    #[inline(always)]
    pub fn load(&self, t: usize, row: &mut [f32]) {
        let at = self.offset + t * self.token;
        match self.data {
            Data::F32(x) => self.copy(x, at, row, |x, row| row.copy_from_slice(x), |x| x),
            Data::F16(x) => self.copy(x, at, row, |x, row| x.convert_to_f32_slice(row), f16::to_f32),
            Data::BF16(x) => self.copy(x, at, row, widen_bf16, bf16::to_f32),
        }
    }

    #[inline(always)]
    fn copy<T: Copy>(
        &self,
        data: &[T],
        at: usize,
        row: &mut [f32],
        slice: impl Fn(&[T], &mut [f32]),
        one: impl Fn(T) -> f32,
    ) {
        if self.element == 1 {
            slice(&data[at..at + row.len()], row);
        } else {
            for (i, y) in row.iter_mut().enumerate() {
                *y = one(data[at + i * self.element]);
            }
        }
    }
}

#[inline(always)]
fn widen_bf16(x: &[bf16], row: &mut [f32]) {
    for (y, x) in row.iter_mut().zip(x) {
        *y = f32::from_bits(u32::from(x.to_bits()) << 16);
    }
}

/// Asks for large pages, if the system has them: otherwise it hands out a large buffer 4 KiB at a time as it is written,
/// which takes as long as computing what is written.
fn in_large_pages<T>(data: Vec<T>) -> Vec<T> {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let range = data.as_ptr()..data.as_ptr().wrapping_add(data.capacity());
        let (start, end) = (range.start.addr().next_multiple_of(LARGE), range.end.addr() / LARGE * LARGE);
        if start < end {
            // SAFETY: the range lies within the buffer, and the advice changes nothing that a program can see.
            unsafe {
                libc::madvise(
                    range.start.wrapping_byte_add(start - range.start.addr()).cast_mut().cast(),
                    end - start,
                    libc::MADV_HUGEPAGE,
                );
            }
        }
    }
    data
}

/// Elements of one of the dtypes that operators take.
#[derive(Debug)]
pub(super) enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Buffer {
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F16 => Self::F16(in_large_pages(vec![f16::ZERO; len])),
            DType::BF16 => Self::BF16(in_large_pages(vec![bf16::ZERO; len])),
            _ => Self::F32(in_large_pages(vec![0.; len])),
        }
    }

    /// The same numbers in another dtype.
    pub fn cast(self, dtype: DType) -> Self {
        match self {
            Self::F32(x) if dtype != DType::F32 => {
                let mut y = Self::zeros(dtype, x.len());
                // SAFETY: nothing else writes to a buffer that was just made.
                unsafe { y.writer().store(0, &x) };
                y
            }
            other => other,
        }
    }

    /// The numbers, widened if need be.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(x) => x,
            Self::F16(x) => x.into_iter().map(f16::to_f32).collect(),
            Self::BF16(x) => x.into_iter().map(bf16::to_f32).collect(),
        }
    }

    pub fn into_storage(self) -> CpuStorage {
        match self {
            Self::F32(x) => CpuStorage::F32(x),
            Self::F16(x) => CpuStorage::F16(x),
            Self::BF16(x) => CpuStorage::BF16(x),
        }
    }

    /// Lets tasks write distinct parts at the same time.
    pub fn writer(&mut self) -> Writer<'_> {
        let (data, len) = match self {
            Self::F32(x) => (Pointer::F32(x.as_mut_ptr()), x.len()),
            Self::F16(x) => (Pointer::F16(x.as_mut_ptr()), x.len()),
            Self::BF16(x) => (Pointer::BF16(x.as_mut_ptr()), x.len()),
        };
        Writer { data, len, borrow: PhantomData }
    }
}

/// Room for f32 that hold nothing yet: to set them to 0 takes a thread as long as all threads take to compute them.
pub(super) struct Room(Vec<f32>);

impl Room {
    pub fn new(len: usize) -> Self {
        Self(in_large_pages(Vec::with_capacity(len)))
    }

    /// Lets tasks write distinct parts at the same time: by [`Writer::fresh_row`], before which nothing can be read.
    pub fn writer(&mut self) -> Writer<'_> {
        let room = self.0.spare_capacity_mut();
        Writer { data: Pointer::F32(room.as_mut_ptr().cast()), len: room.len(), borrow: PhantomData }
    }

    /// # Safety
    ///
    /// The first `len` elements have been written.
    pub unsafe fn filled(mut self, len: usize) -> Buffer {
        // SAFETY: what the caller promises.
        unsafe { self.0.set_len(len) };
        Buffer::F32(self.0)
    }
}

#[derive(Debug, Clone, Copy)]
enum Pointer {
    F32(*mut f32),
    F16(*mut f16),
    BF16(*mut bf16),
}

/// See [`Buffer::writer`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Writer<'a> {
    data: Pointer,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer stands for an exclusive borrow of plain numbers; `store` and `row` leave it to the caller that no
// two threads touch the same elements.
unsafe impl Send for Writer<'_> {}
// SAFETY: as above.
unsafe impl Sync for Writer<'_> {}

impl<'a> Writer<'a> {
    pub fn is_f32(&self) -> bool {
        matches!(self.data, Pointer::F32(_))
    }

    /// Says that the `len` elements from `at` on will be stored soon.
    #[inline(always)]
    pub fn prefetch(&self, at: usize, len: usize) {
        match self.data {
            Pointer::F32(p) => prefetch(p.wrapping_add(at), len),
            Pointer::F16(p) => prefetch(p.wrapping_add(at), len),
            Pointer::BF16(p) => prefetch(p.wrapping_add(at), len),
        }
    }

    /// Writes `row` to the elements from `at` on, rounding to the dtype.
    ///
    /// # Safety
    ///
    /// No other thread reads or writes these elements meanwhile.
    #[inline(always)]
    pub unsafe fn store(&self, at: usize, row: &[f32]) {
        assert!(at + row.len() <= self.len, "a row ends beyond its buffer");
        // SAFETY: the range was checked to lie within the buffer and the caller promises that it is ours.
        unsafe {
            match self.data {
                Pointer::F32(p) => p.add(at).copy_from_nonoverlapping(row.as_ptr(), row.len()),
                Pointer::F16(p) => {
                    std::slice::from_raw_parts_mut(p.add(at), row.len()).convert_from_f32_slice(row)
                }
                Pointer::BF16(p) => {
                    for (y, x) in std::slice::from_raw_parts_mut(p.add(at), row.len()).iter_mut().zip(row) {
                        *y = bf16::from_f32(*x);
                    }
                }
            }
        }
    }

    /// The `len` elements from `at` on, of a buffer of f32.
    ///
    /// # Safety
    ///
    /// While the row is used no one else, on this thread or another, reads or writes these elements.
    pub unsafe fn row(&self, at: usize, len: usize) -> &'a mut [f32] {
        let Pointer::F32(p) = self.data else { unreachable!("rows are taken of f32 buffers only") };
        assert!(at + len <= self.len, "a row ends beyond its buffer");
        // SAFETY: the range was checked to lie within the buffer and the caller promises that it is ours.
        unsafe { std::slice::from_raw_parts_mut(p.add(at), len) }
    }

    /// The same of elements that may hold nothing yet, set to 0.
    ///
    /// # Safety
    ///
    /// As for [`row`](Self::row).
    pub unsafe fn fresh_row(&self, at: usize, len: usize) -> &'a mut [f32] {
        let Pointer::F32(p) = self.data else { unreachable!("rows are taken of f32 buffers only") };
        assert!(at + len <= self.len, "a row ends beyond its buffer");
        // SAFETY: the range was checked to lie within the buffer and the caller promises that it is ours.
        unsafe {
            p.add(at).write_bytes(0, len);
            self.row(at, len)
        }
    }
}
