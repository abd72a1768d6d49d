//! Products of tiles: 16 rows of 32 numbers each in bf16 times as many columns of `x`, sums in f32.

use half::bf16;
use std::arch::{asm, x86_64::__m512i};

/// Rows of a tile, and its columns where they are f32.
pub(super) const SIDE: usize = 16;
/// Elements of a row of weights in a tile.
pub(super) const DEPTH: usize = 32;
/// Numbers in bf16 that an element of `x` is the sum of.
pub(super) const PIECES: usize = 2;

/// Sums of 16 outputs for 16 rows of `x`: a vector for each output.
pub(super) type Sums = [__m512i; SIDE];

/// The sizes of tiles, as the machine wants to be told.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Tiles 0 to 3 are sums, 4 and 5 weights of so many outputs, 6 and 7 so many rows of `x`.
    fn new(outputs: [usize; 2], width: usize) -> Self {
        let sides = [outputs[0], outputs[1], outputs[0], outputs[1], outputs[0], outputs[1], SIDE, SIDE];
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (tile, side) in sides.into_iter().enumerate() {
            let lanes = if tile == 4 || tile == 5 { SIDE } else { width };
            config.rows[tile] = side as u8;
            config.row_bytes[tile] = (4 * lanes) as u16;
        }
        config
    }
}

/// The weights of two groups of up to 16 outputs: where the first begins, how far the next one is, how many there are.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    /// What comes next, to be in L2 by then: memory is read a panel at a time, in its own order. May end before that does.
    pub ahead: *const bf16,
    pub from: [*const bf16; 2],
    pub stride: usize,
    pub outputs: [usize; 2],
}

/// Adds the products with `steps` tiles of up to 16 rows of `x`.
///
/// # Safety
/// The process may use AMX; `x` has `steps * PIECES` tiles of this width, and each output `steps * DEPTH` weights.
pub(super) unsafe fn add_products(
    weights: Weights,
    x: &[u32],
    width: usize,
    steps: usize,
    sums: &mut [Sums; 2],
) {
    debug_assert!(x.len() >= steps * PIECES * SIDE * width);
    let config = Config::new(weights.outputs, width);
    // SAFETY: tiles are within what the caller promises and within `sums`; all that they hold is read and written here.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tileloadd tmm0, [{sums} + {line}]",
            "tileloadd tmm1, [{sums} + {line} + 1024]",
            "2:",
            "tileloadd tmm4, [{first} + {stride}]",
            "tileloadd tmm6, [{x} + {x_stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{second} + {stride}]",
            "tdpbf16ps tmm1, tmm5, tmm6",
            "add {x}, {x_tile}",
            "tileloadd tmm7, [{x} + {x_stride}]",
            "tdpbf16ps tmm0, tmm4, tmm7",
            "tdpbf16ps tmm1, tmm5, tmm7",
            "add {x}, {x_tile}",
            "add {first}, 64",
            "add {second}, 64",
            ".rept 32",
            "prefetcht1 [{ahead}]",
            "add {ahead}, 64",
            ".endr",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilerelease",
            config = in(reg) &config,
            sums = in(reg) sums.as_mut_ptr(),
            line = in(reg) 4 * SIDE,
            first = inout(reg) weights.from[0] => _,
            second = inout(reg) weights.from[1] => _,
            stride = in(reg) 2 * weights.stride,
            ahead = inout(reg) weights.ahead => _,
            x = inout(reg) x.as_ptr() => _,
            x_stride = in(reg) 4 * width,
            x_tile = in(reg) 4 * SIDE * width,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The same with two groups of 16 rows of `x`. The sums of the second group follow those of the first.
///
/// # Safety
/// As [`add_products`], for both groups, of width [`SIDE`].
pub(super) unsafe fn add_products_twice(
    weights: Weights,
    x: [&[u32]; 2],
    steps: usize,
    sums: &mut [Sums; 4],
) {
    debug_assert!(x.iter().all(|x| x.len() >= steps * PIECES * SIDE * SIDE));
    let config = Config::new(weights.outputs, SIDE);
    // SAFETY: as above.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tileloadd tmm0, [{sums} + {line}]",
            "tileloadd tmm1, [{sums} + {line} + 1024]",
            "tileloadd tmm2, [{sums} + {line} + 2048]",
            "tileloadd tmm3, [{sums} + {line} + 3072]",
            "2:",
            "tileloadd tmm4, [{first} + {stride}]",
            "tileloadd tmm6, [{x0} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{second} + {stride}]",
            "tdpbf16ps tmm1, tmm5, tmm6",
            "tileloadd tmm7, [{x1} + {line}]",
            "tdpbf16ps tmm2, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{x0} + {line} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm5, tmm6",
            "tileloadd tmm7, [{x1} + {line} + 1024]",
            "tdpbf16ps tmm2, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x0}, 2048",
            "add {x1}, 2048",
            "add {first}, 64",
            "add {second}, 64",
            ".rept 8",
            "prefetcht1 [{ahead}]",
            "add {ahead}, 64",
            ".endr",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 3072], tmm3",
            "tilerelease",
            config = in(reg) &config,
            sums = in(reg) sums.as_mut_ptr(),
            line = in(reg) 4 * SIDE,
            first = inout(reg) weights.from[0] => _,
            second = inout(reg) weights.from[1] => _,
            stride = in(reg) 2 * weights.stride,
            ahead = inout(reg) weights.ahead => _,
            x0 = inout(reg) x[0].as_ptr() => _,
            x1 = inout(reg) x[1].as_ptr() => _,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
