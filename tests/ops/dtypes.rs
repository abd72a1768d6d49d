//! f16 and bf16: as accurate as rounding the result, however long the sequence.

use crate::case::{Case, Op};
use crate::compare::close;
use crate::run::{Graph, MODES};
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::linear_attn;

const HALVES: [DType; 2] = [DType::BF16, DType::F16];

#[test]
fn half_precision_is_within_rounding() {
    for dtype in HALVES {
        for op in Op::ALL {
            for gate_dtype in [DType::F32, dtype] {
                for t in [63, 64, 200] {
                    Case { op, t, dtype, gate_dtype, group: 2, k: 33, v: 20, ..Case::default() }
                        .check_modes(Graph::ALL)
                        .unwrap();
                }
            }
        }
    }
}

#[test]
fn half_precision_normalized_is_within_rounding() {
    for dtype in HALVES {
        for scale in [None, Some(-0.37)] {
            Case { t: 150, dtype, scale, normalize: true, ..Case::default() }
                .check_modes(Graph::ALL)
                .unwrap();
        }
    }
}

#[test]
fn half_precision_error_does_not_grow_with_the_length() {
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            Case { op, normalize, t: 2048, h: 1, dtype: DType::BF16, ..Case::default() }
                .check_modes(Graph::ALL)
                .unwrap();
        }
    }
}

/// Key heads shared by value heads: the parts of dq and dk are added before they are rounded, not after.
#[test]
fn grouped_gradients_are_rounded_once() {
    for op in Op::ALL {
        Case { op, t: 65, group: 8, dtype: DType::BF16, gate_dtype: DType::BF16, ..Case::default() }
            .check_modes(Graph::ALL)
            .unwrap();
    }
}

/// A bf16 sum of ones would stop at 256, an f16 one at 2048.
#[test]
fn states_of_half_precision_inputs_are_f32() {
    for dtype in HALVES {
        let ones = Tensor::ones((1, 4097, 1, 1), DType::F32, &Device::Cpu).unwrap();
        let x = ones.to_dtype(dtype).unwrap();
        let case = Case { dtype, t: 4097, h: 1, k: 1, v: 1, ..Case::default() };
        for mode in MODES {
            let opts = case.options(mode, &Default::default()).with_final_state(true);
            let got = linear_attn(&x, &x, &x, &opts).unwrap();
            let label = format!("{dtype:?} {mode:?}: sum of 4097 ones");
            let kv = got.state.unwrap().kv;
            close(&kv, &[4097.0], DType::F32, 0.0, &label).unwrap();
        }
    }
}
