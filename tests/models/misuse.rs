//! Parts of layers given what they were not made for: an error that says so, never a panic and never a result.

use crate::support::*;
use candle_core::{DType, Result, Tensor};
use candle_linear_attn::nn::*;
use candle_nn::{VarBuilder, VarMap};

fn fresh() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU)
}

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &CPU).unwrap()
}

#[test]
fn a_norm_takes_rows_of_its_own_size() -> Result<()> {
    let norm = RmsNorm::new(4, 1e-5, true, fresh())?;
    // Among them shapes with a whole number of fours in them.
    for dims in [&[2, 2][..], &[4, 1], &[3, 8], &[2, 6], &[3], &[]] {
        for dtype in [DType::F32, DType::BF16] {
            let xs = zeros(dims).to_dtype(dtype)?;
            assert_says(&message(norm.forward(&xs)), &["xs", &format!("{dims:?}"), "4"]);
        }
    }
    assert_eq!(norm.forward(&zeros(&[0, 4]))?.dims(), [0, 4]);
    assert!(message(RmsNorm::new(0, 1e-5, true, fresh())?.forward(&zeros(&[3, 0]))).contains("at least 1"));
    Ok(())
}

#[test]
fn the_epsilon_of_a_norm_is_no_negative_number() -> Result<()> {
    for eps in [-1e-5, f64::NAN, f64::INFINITY] {
        let norms = [RmsNorm::new(4, eps, true, fresh()), RmsNorm::zero_centered(4, eps, fresh())];
        for refusal in norms.map(message).into_iter().chain([message(LayerNorm::new(4, eps, true, fresh()))])
        {
            assert_says(&refusal, &[&format!("eps is {eps}"), "positive"]);
        }
    }
    RmsNorm::new(4, 0., true, fresh()).map(|_| ())
}

#[test]
fn a_mixture_of_experts_takes_rows_of_its_own_size_or_none() -> Result<()> {
    let config = MixtureOfExpertsConfig {
        hidden_size: 4,
        intermediate_size: 6,
        router: RouterConfig::new(3, 2, true),
        shared: SharedExpert::None,
        names: ExpertNames::Proj,
        kind: GluKind::Swish,
        initializer_range: 0.02,
    };
    let experts = MixtureOfExperts::new(&config, fresh())?;
    for dims in [&[2, 4][..], &[1, 2, 8], &[]] {
        assert_says(
            &message(experts.forward(&zeros(dims))),
            &[&format!("xs: shape is {dims:?}"), "[B, T, 4]"],
        );
    }
    for dims in [[2, 0, 4], [0, 3, 4]] {
        assert_eq!(experts.forward(&zeros(&dims))?.dims(), dims);
    }
    Ok(())
}

#[test]
fn a_gated_mlp_takes_rows_of_its_own_size() -> Result<()> {
    let config = GatedMlpConfig {
        hidden_size: 4,
        intermediate_size: 6,
        kind: GluKind::Swish,
        initializer_range: 0.02,
    };
    let mlp = GatedMlp::new(&config, fresh())?;
    for dims in [&[2, 2][..], &[4, 1], &[3, 8], &[]] {
        assert!(mlp.forward(&zeros(dims)).is_err(), "{dims:?}");
    }
    for (hidden_size, intermediate_size) in [(0, 6), (4, 0), (usize::MAX, 6), (4, usize::MAX)] {
        let config = GatedMlpConfig { hidden_size, intermediate_size, ..config.clone() };
        assert_says(&message(GatedMlp::new(&config, fresh())), &["_size is", "from 1 to"]);
    }
    assert!(GatedMlpConfig::intermediate_size(usize::MAX, 1e300) > 1 << 60);
    Ok(())
}

#[test]
fn feature_maps_take_what_they_can_map() -> Result<()> {
    use FeatureMapKind::*;
    for kind in [ElementwiseProduct, Hedgehog, T2r, Dpfp, Elu, Relu, Identity] {
        let map = FeatureMap::new(kind, 4, 0.02, fresh())?;
        for dims in [&[2, 0][..], &[2, 8], &[]] {
            let ys = map.forward(&zeros(dims));
            // The others take rows of any size.
            if matches!(kind, ElementwiseProduct | Hedgehog | T2r) {
                assert!(ys.is_err(), "{kind:?} of {dims:?}");
            }
        }
        assert!(map.forward(&zeros(&[2, 4]))?.elem_count() >= 8);
    }
    let dpfp = FeatureMap::new(Dpfp, 4, 0.02, fresh())?;
    assert_says(&message(dpfp.forward(&zeros(&[2, 0]))), &["dpfp", "[2, 0]", "at least 1"]);
    Ok(())
}

#[test]
fn a_rotation_needs_positions_and_frequencies() -> Result<()> {
    for base in [0., -1., f64::NAN, f64::INFINITY] {
        assert_says(&message(RotaryEmbedding::new(4, base)), &["base", "finite and above 0"]);
    }
    let rotary = RotaryEmbedding::new(4, 10000.)?;
    assert_says(
        &message(rotary.forward(&zeros(&[1, 2, 1, 4]), usize::MAX)),
        &["offset", "18446744073709551615"],
    );
    assert_says(&message(rotary.forward(&zeros(&[1, 2, 1, 6]), 0)), &["6 channels", "4"]);
    assert!(rotary.forward(&zeros(&[1, 2, 4]), 0).is_err());
    Ok(())
}

#[test]
fn a_short_convolution_takes_its_own_channels_and_past() -> Result<()> {
    let conv = ShortConvolution::new(4, 3, true, 0.02, fresh())?;
    assert_says(&message(conv.forward(&zeros(&[1, 2, 8]), None)), &["8 channels", "4"]);
    assert!(conv.forward(&zeros(&[2, 4]), None).is_err());
    for past in [&[1, 3, 4][..], &[2, 2, 4], &[1, 2, 2], &[2, 4]] {
        assert!(conv.forward(&zeros(&[1, 2, 4]), Some(&zeros(past))).is_err(), "{past:?}");
    }
    let (ys, past) = conv.forward(&zeros(&[1, 0, 4]), None)?;
    assert_eq!((ys.dims(), past.dims()), (&[1, 0, 4][..], &[1, 2, 4][..]));
    for (channels, width) in [(4, 0), (4, 1025), (0, 4)] {
        let made = ShortConvolution::new(channels, width, false, 0.02, fresh());
        assert!(made.and_then(|conv| conv.forward(&zeros(&[1, 2, 4]), None)).is_err(), "{channels} {width}");
    }
    Ok(())
}

#[test]
fn a_short_convolution_as_a_function_names_what_is_wrong() -> Result<()> {
    let (xs, weight) = (zeros(&[2, 5, 3]), zeros(&[3, 1, 4]));
    let call = |xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>, opts: ShortConvOptions| {
        short_conv(xs, weight, bias, &opts)
    };
    let none = ShortConvOptions::default();
    assert_says(&message(call(&xs, &zeros(&[4, 1, 4]), None, none)), &["3 channels", "[4, 1, 4]"]);
    assert_says(&message(call(&xs, &zeros(&[3, 2, 4]), None, none)), &["[3, 2, 4]"]);
    assert_says(&message(call(&xs, &zeros(&[3, 1, 0]), None, none)), &["conv_size is 0"]);
    assert_says(&message(call(&xs, &zeros(&[3, 4]), None, none)), &["weight: shape is [3, 4]", "[C, 1, W]"]);
    assert_says(&message(call(&zeros(&[5, 3]), &weight, None, none)), &["xs: shape is [5, 3]", "[B, T, C]"]);
    assert_says(&message(call(&xs, &weight, Some(&zeros(&[4])), none)), &["bias", "[3]"]);
    let packed = ShortConvOptions { cu_seqlens: Some(&[0, 5]), ..none };
    assert_says(&message(call(&xs, &weight, None, packed)), &["B = 2", "B = 1"]);
    let packed = ShortConvOptions { cu_seqlens: Some(&[0, 4]), ..none };
    assert_says(&message(call(&zeros(&[1, 5, 3]), &weight, None, packed)), &["ends at 4", "T = 5"]);
    let past = zeros(&[2, 2, 3]);
    let past = ShortConvOptions { past: Some(&past), ..none };
    assert_says(&message(call(&xs, &weight, None, past)), &["past", "[2, 2, 3]", "(2, 3, 3)"]);
    assert_says(
        &message(call(&zeros(&[2, 5, 0]), &zeros(&[0, 1, 4]), None, none)),
        &["0 channels", "at least 1"],
    );
    for dims in [[0, 5, 3], [2, 0, 3]] {
        let weight = zeros(&[dims[2], 1, 4]);
        let (ys, last) = call(&zeros(&dims), &weight, None, none)?;
        assert_eq!((ys.dims(), last.dims()), (&dims[..], &[dims[0], 3, dims[2]][..]));
    }
    Ok(())
}

/// The last inputs carry a gradient too: a long sequence can be trained in pieces.
#[test]
fn the_past_of_a_short_convolution_has_a_gradient() -> Result<()> {
    let xs = candle_core::Var::from_tensor(&pseudo_random(&[2, 5, 3], 1)?)?;
    let weight = candle_core::Var::from_tensor(&pseudo_random(&[3, 1, 4], 2)?)?;
    let bias = candle_core::Var::from_tensor(&pseudo_random(&[3], 3)?)?;
    let cotangent = pseudo_random(&[2, 5, 3], 4)?;
    let run = |pieces: &[usize]| -> Result<Vec<Tensor>> {
        let (mut past, mut start, mut ys) = (None, 0, Vec::new());
        for len in pieces {
            let opts = ShortConvOptions { silu: true, past: past.as_ref(), cu_seqlens: None };
            let (y, last) = short_conv(&xs.narrow(1, start, *len)?, &weight, Some(&bias), &opts)?;
            ys.push(y);
            (past, start) = (Some(last), start + len);
        }
        let ys = Tensor::cat(&ys, 1)?;
        let gradients = (&ys * &cotangent)?.sum_all()?.backward()?;
        let of = |var: &candle_core::Var| gradients.get(var).expect("a gradient").clone();
        Ok(vec![ys, of(&xs), of(&weight), of(&bias)])
    };
    let whole = run(&[5])?;
    for pieces in [&[1, 4][..], &[2, 3], &[1, 1, 1, 1, 1]] {
        for (found, expected) in run(pieces)?.iter().zip(&whole) {
            assert_close("pieces", found, expected, 1e-6)?;
        }
    }
    for dtype in [DType::F16, DType::BF16] {
        let [xs, weight] = [&xs, &weight].map(|x| x.to_dtype(dtype));
        let opts = ShortConvOptions { silu: true, ..Default::default() };
        let (ys, last) = short_conv(&xs?, &weight?, None, &opts)?;
        assert_eq!((ys.dtype(), last.dtype()), (dtype, dtype));
    }
    Ok(())
}

#[test]
fn a_layer_norm_takes_rows_of_its_own_size() -> Result<()> {
    let norm = LayerNorm::new(4, 1e-5, true, fresh())?;
    for dims in [&[2, 2][..], &[4, 1], &[3], &[], &[2, 0]] {
        assert!(norm.forward(&zeros(dims)).is_err(), "{dims:?}");
    }
    assert!(norm.forward(&zeros(&[3, 8])).is_err());
    assert_eq!(norm.forward(&zeros(&[0, 4]))?.dims(), [0, 4]);
    assert!(LayerNorm::new(0, 1e-5, true, fresh())?.forward(&zeros(&[3, 0])).is_err());
    Ok(())
}

/// A cache of a layer of the same sizes has states of the right shapes.
#[test]
fn a_cache_of_a_layer_without_convolutions_is_refused_by_one_with() -> Result<()> {
    let plain = GatedLinearAttentionConfig { hidden_size: 8, num_heads: 2, ..Default::default() };
    let with_conv = GatedLinearAttentionConfig { use_short_conv: true, ..plain.clone() };
    let [plain, with_conv] = [plain, with_conv].map(|config| GatedLinearAttention::new(&config, fresh()));
    let (plain, with_conv) = (plain?, with_conv?);
    let xs = pseudo_random(&[1, 3, 8], 1)?;
    for (first, second, held) in [(&plain, &with_conv, "0 short"), (&with_conv, &plain, "3 short")] {
        let mut cache = LayerCache::new();
        first.forward(&xs, Some(&mut cache))?;
        assert_says(&message(second.forward(&xs, Some(&mut cache))), &["cache", held]);
        first.forward(&xs, Some(&mut cache))?;
        assert_eq!(cache.tokens(), 6);
    }
    Ok(())
}
