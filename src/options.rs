//! What a caller can ask of an operator ([`Options`], [`Mode`]) and what comes back ([`Output`], [`State`]).

use candle_core::Tensor;

/// The algorithm that evaluates an operator.
///
/// All modes give the same result within rounding, forward and backward, for every input. They differ in what they keep
/// in memory and in what they do in parallel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// The fastest of the others for the problem at hand.
    #[default]
    Auto,
    /// Token by token, in the order of the definition. The form for decoding.
    Recurrent,
    /// The state at each chunk boundary is written to memory, then all chunks are solved in parallel.
    Chunk,
    /// One pass over the sequence; the state never leaves the working set of a task.
    FusedChunk,
}

/// The recurrent state after a sequence, or before one.
#[derive(Debug, Clone)]
pub struct State {
    /// `[N, HV, K, V]`, f32: one state for each sequence.
    pub kv: Tensor,
    /// `[N, HV, K]`, f32: the running sum of keys that the normalised [`linear_attn`](crate::linear_attn) divides by;
    /// `None` for everything else.
    pub z: Option<Tensor>,
}

/// What an operator returns.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[B, T, HV, V]`, in the dtype of `v`.
    pub out: Tensor,
    /// The state after each sequence, if [`Options::with_final_state`] asked for it.
    pub state: Option<State>,
}

/// Options that all operators share. The default is: mode [`Mode::Auto`], scale `1 / sqrt(K)`, a zero initial state, no
/// final state, one sequence for each batch entry, no normalisation.
///
/// ```
/// use candle_linear_attn::{Mode, Options};
/// let opts = Options::default().with_mode(Mode::Chunk).with_scale(0.5).with_final_state(true);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub(crate) mode: Mode,
    pub(crate) scale: Option<f64>,
    pub(crate) initial_state: Option<State>,
    pub(crate) final_state: bool,
    pub(crate) cu_seqlens: Option<Vec<u32>>,
    pub(crate) normalize: bool,
}

impl Options {
    /// The algorithm, [`Mode::Auto`] unless set.
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// The factor on `q . k`. Every finite number means itself, 0 and -1 included; the operator refuses NaN and
    /// infinities. Unset, it is `1 / sqrt(K)`.
    pub fn with_scale(mut self, scale: impl Into<Option<f64>>) -> Self {
        self.scale = scale.into();
        self
    }

    /// The state before the first token of each sequence. Gradients reach it.
    pub fn with_initial_state(mut self, state: &State) -> Self {
        self.initial_state = Some(state.clone());
        self
    }

    /// Whether [`Output::state`] is wanted.
    pub fn with_final_state(mut self, wanted: bool) -> Self {
        self.final_state = wanted;
        self
    }

    /// Packs N sequences in one batch entry: `cu_seqlens = [0, n1, n1 + n2, ...]`, N + 1 numbers that never decrease and
    /// end at T. Needs B = 1. Empty sequences are legal.
    pub fn with_cu_seqlens(mut self, cu_seqlens: &[u32]) -> Self {
        self.cu_seqlens = Some(cu_seqlens.to_vec());
        self
    }

    /// Divide by `scale * q_t . z_t + 1e-10`, with `z_t` the running sum of keys. Only [`linear_attn`](crate::linear_attn)
    /// has this.
    pub fn with_normalize(mut self, normalize: bool) -> Self {
        self.normalize = normalize;
        self
    }
}
