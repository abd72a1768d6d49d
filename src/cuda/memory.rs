//! Tensors as kernels see them: addresses, strides, dtypes.

use std::ffi::c_void;
use std::ptr::null_mut;

use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

use super::ffi;
use super::machine::{Guard, Machine};

/// A tensor that is not there: zero everywhere, or not wanted.
pub(super) const NO_TENSOR: ffi::Tensor = ffi::Tensor {
    data: null_mut(),
    batch: 0,
    token: 0,
    head: 0,
    element: 0,
    group: 1,
    dtype: ffi::Dtype::BF16,
};

/// As [`NO_TENSOR`].
pub(super) const NO_STATES: ffi::States =
    ffi::States { data: null_mut(), sequence: 0, head: 0, row: 0, col: 0 };

/// What kernels compute: memory that is allocated and not filled.
pub(super) struct Buffer {
    storage: Storage,
    dtype: DType,
    layout: Layout,
}

impl Buffer {
    pub fn new(machine: &Machine, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let layout = Layout::contiguous(shape);
        Ok(Self { storage: machine.allocate(dtype, layout.shape().elem_count())?, dtype, layout })
    }

    pub fn into_storage(self) -> Storage {
        self.storage
    }

    pub fn into_tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.layout.shape(), BackpropOp::none(), false)
    }

    /// The storage and its shape, as [`crate::autograd`] has results.
    pub fn into_result(self) -> (Storage, Shape) {
        (self.storage, self.layout.shape().clone())
    }
}

/// A tensor, open for reading as long as this is there.
pub(super) struct Held<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
    dtype: DType,
}

impl<'a> Held<'a> {
    pub fn new(x: &'a Tensor) -> Self {
        let (storage, layout) = x.storage_and_layout();
        Self { storage, layout, dtype: x.dtype() }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// Hands out addresses and keeps what has to be kept until the kernels that use them are queued.
pub(super) struct Addresses<'a> {
    machine: &'a Machine,
    guards: Vec<Guard<'a>>,
}

impl<'a> Addresses<'a> {
    pub fn new(machine: &'a Machine) -> Self {
        Self { machine, guards: Vec::new() }
    }

    /// `[B, T, H, D]` of which the last dimensions may be missing, or `[H]`. H divides `heads`.
    pub fn tensor(&mut self, x: Option<&'a Held<'a>>, heads: usize) -> Result<ffi::Tensor> {
        let Some(x) = x else { return Ok(NO_TENSOR) };
        let stride = |i| x.layout.stride().get(i).map_or(0, |&s| s as i64);
        let head_axis = if x.layout.dims().len() == 1 { 0 } else { 2 };
        let Some(groups) = x.layout.dims().get(head_axis).map(|h| heads / h) else {
            bail!("a tensor of shape {:?} has no heads", x.layout.shape());
        };
        let strides = match head_axis {
            0 => [0, 0, stride(0), 0],
            _ => [stride(0), stride(1), stride(2), stride(3)],
        };
        let data = self.at_start(x)?;
        tensor(data, strides, groups, x.dtype)
    }

    /// `[N, HV, K, V]`, or with `transposed` the states seen as `[N, HV, V, K]`.
    pub fn states(&mut self, x: Option<&'a Held<'a>>, transposed: bool) -> Result<ffi::States> {
        let Some(x) = x else { return Ok(NO_STATES) };
        if x.dtype != DType::F32 {
            bail!("states are {:?}, they must be F32", x.dtype);
        }
        states(self.at_start(x)?, x.layout.stride(), transposed)
    }

    /// A tensor whose elements are `strides` apart along B, T, H and D.
    pub fn strided(&mut self, x: Option<&'a Held<'a>>, strides: [usize; 4]) -> Result<ffi::Tensor> {
        let Some(x) = x else { return Ok(NO_TENSOR) };
        tensor(self.at_start(x)?, strides.map(|s| s as i64), 1, x.dtype)
    }

    /// A result whose elements are `strides` apart along B, T, H and D.
    pub fn out_strided(&mut self, x: Option<&'a mut Buffer>, strides: [usize; 4]) -> Result<ffi::Tensor> {
        let Some(x) = x else { return Ok(NO_TENSOR) };
        let dtype = x.dtype;
        tensor(self.written(x)?, strides.map(|s| s as i64), 1, dtype)
    }

    pub fn numbers<T>(&mut self, x: Option<&'a Held<'a>>) -> Result<*const T> {
        let Some(x) = x else { return Ok(null_mut()) };
        Ok(self.at_start(x)?.cast_const().cast())
    }

    /// A result `[B, T, HV, D]`.
    pub fn out(&mut self, x: Option<&'a mut Buffer>) -> Result<ffi::Tensor> {
        let Some(x) = x else { return Ok(NO_TENSOR) };
        let [b, t, h, d] = *x.layout.stride() else {
            bail!("a result of shape {:?} is not [B, T, HV, D]", x.layout.shape())
        };
        let (strides, dtype) = ([b, t, h, d].map(|s| s as i64), x.dtype);
        tensor(self.written(x)?, strides, 1, dtype)
    }

    /// A result `[B, T, D]`.
    pub fn out_rows(&mut self, x: Option<&'a mut Buffer>) -> Result<ffi::Tensor> {
        let strides = match x.as_ref().map(|x| x.layout.stride()) {
            None => [0; 4],
            Some([batch, token, element]) => [*batch, *token, 0, *element],
            Some(_) => bail!("a result is not [B, T, D]"),
        };
        self.out_strided(x, strides)
    }

    /// As [`Addresses::states`].
    pub fn out_states(&mut self, x: Option<&'a mut Buffer>, transposed: bool) -> Result<ffi::States> {
        let Some(x) = x else { return Ok(NO_STATES) };
        let strides = x.layout.stride().to_vec();
        states(self.written(x)?, &strides, transposed)
    }

    pub fn out_numbers(&mut self, x: Option<&'a mut Buffer>) -> Result<*mut f32> {
        let Some(x) = x else { return Ok(null_mut()) };
        Ok(self.written(x)?.cast())
    }

    fn at_start(&mut self, x: &'a Held<'a>) -> Result<*mut c_void> {
        let (data, guard) = self.machine.read(&x.storage)?;
        self.guards.push(guard);
        Ok(data.wrapping_byte_add(x.layout.start_offset() * x.dtype.size_in_bytes()))
    }

    fn written(&mut self, x: &'a mut Buffer) -> Result<*mut c_void> {
        let (data, guard) = self.machine.write(&mut x.storage)?;
        self.guards.push(guard);
        Ok(data)
    }
}

fn tensor(data: *mut c_void, strides: [i64; 4], groups: usize, dtype: DType) -> Result<ffi::Tensor> {
    let [batch, token, head, element] = strides;
    Ok(ffi::Tensor {
        data,
        batch,
        token,
        head,
        element,
        group: groups as i32,
        dtype: ffi::Dtype::try_from(dtype)?,
    })
}

impl ffi::Tensor {
    /// Without its columns before `at`.
    pub fn at_column(self, at: usize) -> Self {
        let size: i64 = if matches!(self.dtype, ffi::Dtype::F32) { 4 } else { 2 };
        if self.data.is_null() {
            return self;
        }
        Self { data: self.data.wrapping_byte_offset((at as i64 * self.element * size) as isize), ..self }
    }
}

impl TryFrom<DType> for ffi::Dtype {
    type Error = candle_core::Error;

    fn try_from(dtype: DType) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => bail!("a tensor is {dtype:?}, it must be F32, F16 or BF16"),
        })
    }
}

fn states(data: *mut c_void, strides: &[usize], transposed: bool) -> Result<ffi::States> {
    let [n, h, k, v] = *strides else {
        bail!("states with {} dimensions are not [N, HV, K, V]", strides.len())
    };
    let (row, col) = if transposed { (v, k) } else { (k, v) };
    let [sequence, head, row, col] = [n, h, row, col].map(|s| s as i64);
    Ok(ffi::States { data: data.cast(), sequence, head, row, col })
}
