//! Many sequences at once, as a server has them: prompts of different lengths in one call, then tokens for any of them.

use crate::support::*;
use candle_core::{DType, Result, Tensor};
use candle_linear_attn::Mode;
use candle_linear_attn::models::{Cache, Model};

/// On both sides of a chunk's end, and of the length up to which a sequence is taken token by token.
const LENGTHS: [usize; 8] = [17, 64, 5, 65, 130, 4, 1, 63];
const SLOTS: usize = 11;
const STEPS: usize = 6;

/// The prompt of a sequence.
fn prompt(sequence: usize, vocab: u32) -> Vec<u32> {
    (0..LENGTHS[sequence] as u32)
        .map(|t| (t * t + 7 * t * sequence as u32 + sequence as u32) % vocab)
        .collect()
}

fn greedy(logits: &Tensor) -> Result<u32> {
    logits.to_dtype(DType::F32)?.flatten_all()?.argmax(0)?.to_scalar()
}

/// The logits behind the prompt and behind each of the tokens that follow, one sequence by itself.
fn alone(model: &Model, sequence: usize) -> Result<Vec<Vec<f32>>> {
    let mut cache = model.new_cache();
    let mut ids = prompt(sequence, model.config().vocab_size() as u32);
    let mut found = Vec::new();
    for _ in 0..=STEPS {
        let input = Tensor::new(ids.as_slice(), &CPU)?.unsqueeze(0)?;
        let hidden = model.hidden_states(&input, Some(&mut cache))?;
        let logits = model.logits(&hidden.narrow(1, ids.len() - 1, 1)?)?;
        ids = vec![greedy(&logits)?];
        found.push(logits.flatten_all()?.to_vec1()?);
    }
    Ok(found)
}

/// All prompts in one call: the logits behind each, and the cache of all.
fn prefill(model: &Model) -> Result<(Vec<Tensor>, Cache)> {
    let vocab = model.config().vocab_size() as u32;
    let (mut ids, mut ends) = (Vec::new(), vec![0u32]);
    for sequence in 0..LENGTHS.len() {
        ids.extend(prompt(sequence, vocab));
        ends.push(ids.len() as u32);
    }
    let mut cache = model.new_cache();
    let input = Tensor::new(ids, &CPU)?.unsqueeze(0)?;
    let hidden = model.hidden_states_packed(&input, &ends, Some(&mut cache))?;
    let last = ends[1..].iter().map(|end| model.logits(&hidden.narrow(1, *end as usize - 1, 1)?));
    Ok((last.collect::<Result<_>>()?, cache))
}

/// Prompts packed, then decoded in batches that change from step to step: to the bit what each sequence gets alone.
#[test]
fn eight_sequences_at_once_get_what_each_gets_alone_to_the_bit() -> Result<()> {
    for name in GOLDEN {
        for mode in [Mode::Auto, Mode::Chunk, Mode::Recurrent] {
            let mut model = Model::load(golden_folder(name), None, &CPU)?;
            model.set_mode(mode);
            let expected = (0..LENGTHS.len()).map(|i| alone(&model, i)).collect::<Result<Vec<_>>>()?;
            let (mut logits, cache) = prefill(&model)?;
            assert_eq!(cache.positions(), LENGTHS);
            let slot = |sequence: usize| (sequence * 4 + 3) % SLOTS;
            let mut pool = model.new_pool(SLOTS);
            pool.store(&[0, 1, 2, 3, 4, 5, 6, 7].map(slot), &cache)?;
            let mut steps = [0; LENGTHS.len()];
            for round in 0.. {
                for (sequence, logits) in logits.iter().enumerate() {
                    let found: Vec<f32> = logits.flatten_all()?.to_vec1()?;
                    let same = found == expected[sequence][steps[sequence]];
                    assert!(same, "{name} {mode:?}: sequence {sequence}, step {}", steps[sequence]);
                }
                // Of those that are not done, all but one, in an order of its own.
                let mut batch: Vec<usize> =
                    (0..8).filter(|i| steps[*i] < STEPS && i % 5 != round % 5).collect();
                let turn = round % batch.len().max(1);
                batch.rotate_left(turn);
                if steps.iter().all(|step| *step == STEPS) {
                    break;
                }
                if batch.is_empty() {
                    continue;
                }
                let slots: Vec<usize> = batch.iter().map(|i| slot(*i)).collect();
                let ids = batch.iter().map(|i| greedy(&logits[*i])).collect::<Result<Vec<_>>>()?;
                let mut cache = pool.load(&slots)?;
                let found = model.forward(&Tensor::new(ids, &CPU)?.unsqueeze(1)?, Some(&mut cache))?;
                pool.store(&slots, &cache)?;
                for (row, sequence) in batch.iter().enumerate() {
                    logits[*sequence] = found.narrow(0, row, 1)?;
                    steps[*sequence] += 1;
                    assert_eq!(pool.tokens(slot(*sequence)), Some(LENGTHS[*sequence] + steps[*sequence]));
                }
            }
        }
    }
    Ok(())
}

/// More of them than fit in one group of rows anywhere.
#[test]
fn seventy_sequences_at_once_get_what_each_gets_alone_to_the_bit() -> Result<()> {
    const MANY: usize = 70;
    for name in ["linear_attn", "gated_deltanet-gva", "rwkv7"] {
        let model = Model::load(golden_folder(name), None, &CPU)?;
        let ids = pseudo_tokens(MANY, 14, model.config().vocab_size() as u32)?;
        let pieces = |ids: &Tensor| -> Result<Vec<Vec<f32>>> {
            let mut cache = model.new_cache();
            let mut run = |from, len| {
                let logits = model.forward(&ids.narrow(1, from, len)?, Some(&mut cache))?;
                logits.narrow(1, len - 1, 1)?.squeeze(1)?.to_vec2::<f32>()
            };
            Ok([run(0, 12)?, run(12, 1)?, run(13, 1)?].concat())
        };
        let together = pieces(&ids)?;
        for i in [0, 1, 37, 63, 64, 69] {
            for (step, expected) in pieces(&ids.narrow(0, i, 1)?)?.iter().enumerate() {
                assert!(together[step * MANY + i] == *expected, "{name}: sequence {i}, step {step}");
            }
        }
    }
    Ok(())
}

/// Sequences of every length, empty ones among them, and pieces of sequences that have begun.
#[test]
fn packed_pieces_of_any_length_continue_their_sequences() -> Result<()> {
    for name in GOLDEN {
        let model = Model::load(golden_folder(name), None, &CPU)?;
        let ids = pseudo_tokens(3, 40, model.config().vocab_size() as u32)?;
        let whole = (0..3).map(|i| model.forward(&ids.narrow(0, i, 1)?, None)).collect::<Result<Vec<_>>>()?;
        let mut cache = model.new_cache();
        let mut starts = [0; 3];
        for lengths in [[3, 0, 25], [1, 1, 0], [0, 38, 1], [36, 1, 14]] {
            let parts: Vec<Tensor> = (0..3)
                .filter(|i| lengths[*i] > 0)
                .map(|i| ids.narrow(0, i, 1)?.narrow(1, starts[i], lengths[i]))
                .collect::<Result<_>>()?;
            let ends = [0, lengths[0], lengths[0] + lengths[1], lengths.iter().sum()];
            let packed = Tensor::cat(&parts, 1)?;
            let hidden =
                model.hidden_states_packed(&packed, &ends.map(|end| end as u32), Some(&mut cache))?;
            let logits = model.logits(&hidden)?;
            for i in (0..3).filter(|i| lengths[*i] > 0) {
                let expected = whole[i].narrow(1, starts[i], lengths[i])?;
                assert_close(name, &logits.narrow(1, ends[i], lengths[i])?, &expected, 1e-5)?;
                starts[i] += lengths[i];
            }
            assert_eq!(cache.positions(), starts, "{name}");
        }
        assert_eq!(cache.tokens(), 40);
    }
    Ok(())
}

/// Sequences of different lengths can be trained without padding.
#[test]
fn gradients_of_packed_sequences_are_the_sum_of_those_of_each() -> Result<()> {
    const ENDS: [usize; 5] = [0, 7, 8, 8, 20];
    for model_type in candle_linear_attn::models::SUPPORTED {
        let conv = if *model_type == "gla" { r#", "use_short_conv": true"# } else { "" };
        let (model, varmap) = small_model(&format!("{}{conv}", small_heads(model_type)))?;
        let ids = pseudo_tokens(1, ENDS[4], 11)?;
        let weights = pseudo_random(&[1, ENDS[4], 11], 3)?;
        let hidden = model.hidden_states_packed(&ids, &ENDS.map(|end| end as u32), None)?;
        let packed = (model.logits(&hidden)? * &weights)?.sum_all()?.backward()?;
        let loss = |ends: &[usize]| -> Result<Tensor> {
            let part = |x: &Tensor| x.narrow(1, ends[0], ends[1] - ends[0]);
            (model.forward(&part(&ids)?, None)? * part(&weights)?)?.sum_all()
        };
        let alone = ENDS.windows(2).filter(|ends| ends[0] < ends[1]).map(loss).collect::<Result<Vec<_>>>()?;
        let alone = Tensor::stack(&alone, 0)?.sum_all()?.backward()?;
        for (name, var) in sorted(&varmap).into_iter().filter(|(name, _)| !only_chooses(name)) {
            let [found, expected] =
                [&packed, &alone].map(|gradients| gradients.get(&var).expect("a gradient"));
            assert_close(&format!("{model_type}: {name}"), found, expected, 2e-4)?;
        }
    }
    Ok(())
}

#[test]
fn slots_and_ends_that_do_not_fit_are_named() -> Result<()> {
    let model = Model::load(golden_folder("mamba2"), None, &CPU)?;
    let ids = pseudo_tokens(1, 10, 96)?;
    let mut cache = model.new_cache();
    let packed = |ends: &[u32], cache: Option<&mut Cache>| model.hidden_states_packed(&ids, ends, cache);
    assert_says(&message(packed(&[0, 4, 9], None)), &["cu_seqlens ends at 9", "T = 10"]);
    assert_says(&message(packed(&[1, 10], None)), &["cu_seqlens begins with 1"]);
    assert_says(&message(packed(&[0, 5, 4, 10], None)), &["never decrease"]);
    assert_says(&message(packed(&[], None)), &["cu_seqlens is empty"]);
    let two = pseudo_tokens(2, 5, 96)?;
    assert_says(&message(model.hidden_states_packed(&two, &[0, 10], None)), &["B = 2", "B = 1"]);
    packed(&[0, 4, 10], Some(&mut cache))?;
    assert_says(&message(packed(&[0, 10], Some(&mut cache))), &["number of sequences is 1", "holds 2"]);

    let mut pool = model.new_pool(3);
    assert_eq!((pool.slots(), pool.bytes(), pool.free(), pool.tokens(0)), (3, 0, Some(0), None));
    assert_says(&message(pool.load(&[0])), &["slot 0 is empty"]);
    assert_says(&message(pool.store(&[0], &cache)), &["there are 1", "holds 2 sequences"]);
    assert_says(&message(pool.store(&[0, 0], &cache)), &["slot 0 comes twice"]);
    assert_says(&message(pool.store(&[0, 3], &cache)), &["slot 3 does not exist", "there are 3"]);
    pool.store(&[2, 0], &cache)?;
    assert_eq!(
        (pool.free(), pool.tokens(2), pool.tokens(0), pool.tokens(9)),
        (Some(1), Some(4), Some(6), None)
    );
    assert_eq!(pool.bytes(), cache.bytes() / 2 * 3);
    assert_says(&message(pool.load(&[1])), &["slot 1 is empty"]);
    pool.release(2)?;
    assert_says(&message(pool.load(&[2, 0])), &["slot 2 is empty"]);
    assert_says(&message(pool.release(3)), &["slot 3 does not exist"]);
    assert_eq!(pool.load(&[0])?.positions(), [6]);

    // A model of as many layers, but others.
    let other = Model::load(golden_folder("gla"), None, &CPU)?;
    let mut cache = other.new_cache();
    other.forward(&ids, Some(&mut cache))?;
    assert_says(&message(pool.store(&[1], &cache)), &["cache: holds"]);
    Ok(())
}

/// What was loaded stays what it was when others are stored.
#[test]
fn a_loaded_cache_does_not_change_with_the_pool() -> Result<()> {
    let model = Model::load(golden_folder("retnet"), None, &CPU)?;
    let mut pool = model.new_pool(2);
    let mut first = model.new_cache();
    model.forward(&pseudo_tokens(1, 5, 96)?, Some(&mut first))?;
    pool.store(&[0], &first)?;
    let mut loaded = pool.load(&[0])?;
    let mut second = model.new_cache();
    model.forward(&pseudo_tokens(1, 9, 90)?, Some(&mut second))?;
    pool.store(&[0], &second)?;
    let next = Tensor::new(&[[3u32]], &CPU)?;
    let expected = model.forward(&next, Some(&mut first))?;
    assert_close("loaded", &model.forward(&next, Some(&mut loaded))?, &expected, 0.)
}

/// What a pool holds is what decides which caches it takes, not what it was asked to hold before.
#[test]
fn an_empty_pool_takes_the_cache_of_any_call() -> Result<()> {
    let cache_of = |name: &str, dtype| -> Result<Cache> {
        let model = Model::load(golden_folder(name), Some(dtype), &CPU)?;
        let mut cache = model.new_cache();
        model.forward(&pseudo_tokens(2, 5, 90)?, Some(&mut cache))?;
        Ok(cache)
    };
    let model = Model::load(golden_folder("gla"), None, &CPU)?;
    let (own, other) = (cache_of("gla", DType::F32)?, cache_of("mamba2", DType::BF16)?);
    let mut pool = model.new_pool(3);
    pool.store(&[], &model.new_cache())?;
    assert_eq!((pool.bytes(), pool.free()), (0, Some(0)));
    pool.store(&[0, 1], &other)?;
    assert_says(&message(pool.store(&[1, 2], &own)), &["cache: holds"]);
    assert_eq!((pool.tokens(1), pool.tokens(2)), (Some(5), None));
    pool.release(0)?;
    pool.release(1)?;
    pool.store(&[1, 2], &own)?;
    assert_eq!((pool.free(), pool.bytes()), (Some(0), own.bytes() / 2 * 3));
    assert_says(&message(pool.store(&[0, 1], &other)), &["cache: holds"]);
    let next = Tensor::new(&[[3u32], [4]], &CPU)?;
    let [found, expected] =
        [pool.load(&[1, 2])?, own].map(|mut cache| model.forward(&next, Some(&mut cache)));
    assert_close("gla", &found?, &expected?, 0.)
}

#[test]
fn a_pool_larger_than_memory_is_refused_by_its_slots() -> Result<()> {
    for name in ["gla", "qwen3_next"] {
        let model = Model::load(golden_folder(name), None, &CPU)?;
        let mut cache = model.new_cache();
        model.forward(&pseudo_tokens(1, 5, 90)?, Some(&mut cache))?;
        for slots in [10_000_000_000_000, usize::MAX] {
            let mut pool = model.new_pool(slots);
            let refusal = message(pool.store(&[7], &cache));
            assert_says(&refusal, &[&format!("slots: the states of {slots} need"), "GiB of memory"]);
            assert_eq!((pool.slots(), pool.free(), pool.tokens(7), pool.bytes()), (slots, Some(0), None, 0));
        }
    }
    Ok(())
}
