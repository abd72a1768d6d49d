//! The golden cases in `tests/data/ops`: computed elsewhere in f64, stored in f32.

use crate::case::{ARGS, Case, Inputs, Op};
use crate::compare::{Expected, close, values};
use crate::run::{Graph, MODES};
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::Path;

pub const CASES: [&str; 13] = [
    "linear_attn-scale_none",
    "linear_attn-scale_half",
    "linear_attn-scale_minus1",
    "linear_attn-normalize",
    "linear_attn-varlen",
    "retention",
    "simple_gla",
    "gla",
    "gla-strong_decay",
    "delta_rule",
    "gated_delta_rule-gva",
    "kda",
    "rwkv7",
];

pub struct Golden {
    pub case: Case,
    pub inputs: Inputs,
    tensors: HashMap<String, Tensor>,
}

/// Reads `tests/data/ops/{name}.safetensors`; the header holds the operator and its options as metadata.
pub fn load(name: &str) -> Golden {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/ops").join(format!("{name}.safetensors"));
    let bytes = std::fs::read(&path).expect("the golden files are in tests/data/ops");
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&rest[..length]).unwrap();
    let meta = |key: &str| header["__metadata__"][key].as_str().unwrap().to_string();
    let mut tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();

    let op = match meta("op").as_str() {
        "linear_attn" => Op::LinearAttn,
        "retention" => Op::Retention,
        "simple_gla" => Op::SimpleGla,
        "gla" => Op::Gla,
        "delta_rule" => Op::DeltaRule,
        "gated_delta_rule" => Op::GatedDeltaRule,
        "kda" => Op::Kda,
        "rwkv7" => Op::Rwkv7,
        other => panic!("no operator {other}"),
    };
    let (b, t, h, k) = tensors["q"].dims4().unwrap();
    let (_, _, hv, v) = tensors["v"].dims4().unwrap();
    let cu_seqlens = tensors.remove("cu_seqlens").map(|ends| {
        let ends = ends.to_vec1::<i64>().unwrap();
        ends.into_iter().map(|end| end as u32).collect()
    });
    let case = Case {
        op,
        b,
        t,
        h,
        group: hv / h,
        k,
        v,
        scale: match meta("scale").as_str() {
            "none" => None,
            number => Some(number.parse().unwrap()),
        },
        normalize: meta("normalize") == "true",
        initial_state: tensors.contains_key("h0"),
        cu_seqlens,
        ..Case::default()
    };
    let get = |key: &str| tensors.get(key).cloned();
    let args = ["q", "k", "v", "g", "h0", "z0", "beta", "a", "b"];
    let inputs = Inputs { args: args.map(get), cotangents: ["do", "dht", "dzt"].map(get) };
    Golden { case, inputs, tensors }
}

impl Golden {
    /// The loss the file's gradients belong to: a cotangent that is not there is zero.
    pub fn graph(&self) -> Graph {
        Graph { loss: [0, 1, 2].map(|i| self.inputs.cotangents[i].is_some()), ..Graph::ALL }
    }

    /// What the file says; empty where it says nothing.
    pub fn expected(&self) -> Expected {
        let get = |key: &str| match self.tensors.get(key) {
            Some(tensor) => values(tensor).unwrap(),
            None => Vec::new(),
        };
        Expected {
            outputs: ["o", "ht", "zt"].map(get),
            grads: ["dq", "dk", "dv", "dg", "dh0", "dz0", "dbeta", "da", "db"].map(get),
            gate_terms: 0.0,
        }
    }
}

/// All modes on `device`, within `limits` for o and the states and for the gradients.
pub fn check_on(device: &Device, name: &str, limits: [f64; 2]) {
    let golden = load(name);
    let (case, graph) = (&golden.case, golden.graph());
    let inputs = &golden.inputs.on(device).unwrap();
    let want = golden.expected();

    for mode in MODES {
        let label = format!("{name}, {mode:?}");
        let got = case.run(mode, inputs, graph).unwrap();
        let forward = case.run(mode, inputs, Graph { loss: [true; 3], ..Graph::NONE }).unwrap();
        for (i, output) in ["o", "ht", "zt"].into_iter().enumerate() {
            if want.outputs[i].is_empty() {
                continue;
            }
            let label = format!("{label}: {output}");
            let x = forward.outputs[i].as_ref().expect(&label);
            close(x, &want.outputs[i], case.dtype, limits[0], &label).unwrap();
            if let Some(x) = &got.outputs[i] {
                close(x, &want.outputs[i], case.dtype, limits[0], &label).unwrap();
            }
        }
        for (i, arg) in ARGS.into_iter().enumerate() {
            if !want.grads[i].is_empty() {
                let label = format!("{label}: gradient of {arg}");
                let x = got.grads[i].as_ref().expect(&label);
                close(x, &want.grads[i], case.dtype, limits[1], &label).unwrap();
            }
        }
    }
}
