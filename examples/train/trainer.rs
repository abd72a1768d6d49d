//! The training loop.

use crate::{
    args::Args,
    bpe, chart, checkpoint,
    common::{files::remove_partial_files, runtime},
    data::{Batches, Texts, TokenStream, fingerprint},
    evaluate::bits_per_byte,
    log::{Log, Row},
    loss::token_nll,
    optimizer::{AdamW, Hyperparameters, Schedule},
    params::Parameters,
    progress::Progress,
    workers::{Workers, each},
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::{Config, Model};
use serde_json::{Map, Value};
use std::{
    path::Path,
    time::{Duration, Instant},
};
use tokenizers::Tokenizer;

/// Trains as `args` say, from where the folder `--out` is.
pub fn train(args: &Args) -> Result<()> {
    // A model that cannot be is refused before a tokenizer is trained and the data encoded for it.
    args.model_config(1, 0)?;
    let folder = args.out.as_deref().context("--out is missing")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create --out {}", folder.display()))?;
    remove_partial_files(folder)?;
    let corpus = Corpus::open(args, folder)?;
    let mut run = Run::open(args, folder, &corpus)?;
    let deadline = args.max_minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes));
    for step in run.steps_taken..args.steps {
        let last = step + 1 == args.steps || deadline.is_some_and(|at| Instant::now() >= at);
        run.step(step, last)?;
        if last {
            break;
        }
    }
    run.progress.finish();
    match run.log.rows().last() {
        Some(row) if row.step < args.steps => {
            eprintln!(
                "stopped after step {} of {}; the model is in {}",
                row.step,
                args.steps,
                folder.display()
            );
        }
        _ => eprintln!("all {} steps are done; the model is in {}", args.steps, folder.display()),
    }
    Ok(())
}

/// The tokenizer and the texts as it cuts them.
struct Corpus {
    tokenizer: Tokenizer,
    end_token: u32,
    tokenizer_id: u64,
    data_id: u64,
    train: TokenStream,
    valid: Option<TokenStream>,
}

impl Corpus {
    fn open(args: &Args, folder: &Path) -> Result<Self> {
        let texts = Texts::read(args.data.as_deref().context("--data is missing")?)?;
        let resuming = folder.join(checkpoint::STATE_FILE).exists();
        let (tokenizer, end_token) = match &args.tokenizer {
            Some(file) => bpe::load(file, &args.end_token)?,
            None if resuming => bpe::load(&folder.join("tokenizer.json"), &args.end_token)?,
            None => {
                eprintln!("training a tokenizer");
                bpe::train(&texts, args.bpe_bytes, args.vocab_size, &args.end_token)?
            }
        };
        let tokenizer_id = fingerprint(
            tokenizer.to_string(false).map_err(|e| anyhow!("cannot write the tokenizer: {e}"))?.as_bytes(),
        );
        let encode = |name: &str, texts: &Texts| {
            let cache = folder.join(format!("tokens-{name}.bin"));
            TokenStream::encode_cached(&cache, texts, &tokenizer, tokenizer_id, end_token)
        };
        let train = encode("train", &texts)?;
        let valid = match &args.valid {
            Some(file) => Some(encode("valid", &Texts::read(file)?)?),
            None => None,
        };
        let data_id = texts.fingerprint();
        Ok(Self { tokenizer, end_token, tokenizer_id, data_id, train, valid })
    }
}

/// A run between two steps.
struct Run<'a> {
    args: &'a Args,
    folder: &'a Path,
    corpus: &'a Corpus,
    device: Device,
    workers: Workers,
    config: Config,
    compute: DType,
    recipe: Map<String, Value>,
    parameters: Parameters,
    model: Model,
    optimizer: AdamW,
    schedule: Schedule,
    batches: Batches<'a>,
    log: Log,
    progress: Progress,
    steps_taken: usize,
}

impl<'a> Run<'a> {
    fn open(args: &'a Args, folder: &'a Path, corpus: &'a Corpus) -> Result<Self> {
        let device = runtime::device(args.cpu)?;
        let config = args.model_config(corpus.tokenizer.get_vocab_size(true), corpus.end_token)?;
        let compute = args.compute_dtype(&device);
        let recipe = args.recipe(&config, compute, corpus.tokenizer_id, corpus.data_id)?;
        let batches = Batches::new(&corpus.train, args.seq_len, args.seed)?;
        check_memory(args, &config)?;
        let parameters = Parameters::new(args.seed);
        let mut model = Model::new(&config, parameters.var_builder(compute.into(), &device))?;
        model.set_mode(args.mode.into());
        let hyper = Hyperparameters {
            beta1: args.beta1,
            beta2: args.beta2,
            eps: 1e-8,
            weight_decay: args.weight_decay,
            clip: args.clip,
        };
        let mut optimizer = AdamW::new(parameters.vars(), hyper)?;
        let steps_taken = checkpoint::resume(folder, &recipe, &mut optimizer)?;
        // Only now: the folder may have turned out to be another run's.
        let dtype = args.dtype.into();
        checkpoint::write_metadata(folder, &config, dtype, &corpus.tokenizer, &args.end_token)?;
        let schedule =
            Schedule { peak: args.lr, last: args.min_lr(), warmup: args.warmup, steps: args.steps };
        let sizes = parameters.vars().into_values().map(|var| var.elem_count());
        eprintln!(
            "{} with {} parameters, computed in {}, {} training tokens, {}",
            config.model_type(),
            sizes.sum::<usize>(),
            compute.name(),
            corpus.train.tokens.len(),
            match steps_taken {
                0 => "from the start".to_owned(),
                steps => format!("resumed after step {steps}"),
            }
        );
        Ok(Self {
            args,
            folder,
            corpus,
            config,
            compute: compute.into(),
            recipe,
            parameters,
            model,
            optimizer,
            schedule,
            batches,
            log: Log::open(folder, steps_taken)?,
            progress: Progress::new(args.steps, steps_taken),
            steps_taken,
            workers: Workers::new(&device)?,
            device,
        })
    }

    /// Takes one step, counted from 0. It is on record, and the next one may be lost, only once the state is written; what
    /// is written before that is written again after a resume.
    fn step(&mut self, step: usize, last: bool) -> Result<()> {
        let started = Instant::now();
        let lr = self.schedule.at(step);
        let (loss, norm, grads) = self.gradients(step)?;
        if !loss.is_finite() || !norm.is_finite() {
            bail!(
                "step {}: the loss is {loss} and the gradient norm {norm}; a lower --lr or a longer --warmup may help",
                step + 1
            );
        }
        self.optimizer.step(step, lr, &grads, f64::from(norm))?;
        let tokens = (self.args.grad_accum * self.args.batch_size * self.args.seq_len) as u64;
        let tokens_per_s = tokens as f64 / started.elapsed().as_secs_f64();
        let done = step + 1;
        let due = last || (self.args.eval_every > 0 && done.is_multiple_of(self.args.eval_every));
        let valid_bpb = if due { self.publish(done)? } else { None };
        let row = Row {
            step: done,
            tokens: done as u64 * tokens,
            loss,
            lr,
            grad_norm: norm,
            tokens_per_s,
            valid_bpb,
        };
        self.progress.step(&row);
        self.log.push(row)?;
        if due {
            chart::write(self.folder, self.log.rows())?;
        }
        if last || done.is_multiple_of(self.args.save_every) {
            checkpoint::save(self.folder, done, &self.recipe, &self.optimizer)?;
        }
        Ok(())
    }

    /// Loss, norm of the gradient, and the gradient, over all batches of a step.
    fn gradients(&self, step: usize) -> Result<(f32, f32, Vec<Tensor>)> {
        let (batch_size, accum) = (self.args.batch_size, self.args.grad_accum);
        let mut total = None;
        for i in 0..accum {
            let first = ((step * accum + i) * batch_size) as u64;
            let shares = self.workers.count().min(batch_size);
            let parts = self.workers.map(shares, |share| {
                let start = share * batch_size / shares;
                let end = (share + 1) * batch_size / shares;
                let weight = (end - start) as f64 / (batch_size * accum) as f64;
                self.share_gradients(first + start as u64, end - start, weight)
            })?;
            for part in parts {
                total = Some(match total {
                    None => part,
                    Some(sum) => add(sum, part)?,
                });
            }
        }
        let (loss, grads) = total.context("a step has at least one batch")?;
        let scalars = Tensor::stack(&[loss, AdamW::norm(&grads)?], 0)?.to_vec1::<f32>()?;
        Ok((scalars[0], scalars[1], grads))
    }

    /// Mean loss of `count` sequences from number `first` on, times `weight`, and its gradient.
    fn share_gradients(&self, first: u64, count: usize, weight: f64) -> Result<(Tensor, Vec<Tensor>)> {
        let (inputs, targets) = self.batches.get(first, count, &self.device)?;
        let logits = self.model.forward(&inputs, None)?.flatten_to(1)?.to_dtype(DType::F32)?;
        let loss = (token_nll(&logits, &targets.flatten_all()?)?.mean_all()? * weight)?;
        let grads = self.optimizer.collect(&mut loss.backward()?)?;
        Ok((loss.detach(), grads))
    }

    /// Validates, and writes the model if it is the best so far (or there is nothing to tell by).
    fn publish(&self, done: usize) -> Result<Option<f64>> {
        let bits = match &self.corpus.valid {
            None => None,
            Some(stream) => {
                let vb = self.parameters.frozen().var_builder(self.compute, &self.device);
                let mut model = Model::new(&self.config, vb)?;
                model.set_mode(self.args.mode.into());
                Some(bits_per_byte(&model, stream, self.corpus.end_token, self.args.seq_len, &self.workers)?)
            }
        };
        let best = self.log.best();
        if bits.is_none_or(|bits| best.is_none_or(|best| bits <= best)) {
            checkpoint::write_model(self.folder, self.parameters.detached(), self.args.dtype.into())?;
        }
        if let Some(bits) = bits {
            let best = best.map_or(String::new(), |best| format!(" (best before: {best:.4})"));
            self.progress.note(&format!("step {done}: {bits:.4} bits per byte{best}"));
        }
        Ok(bits)
    }
}

/// The logits of a batch and their gradient are the largest there is in a step; without the memory for them the process
/// would end in the first.
fn check_memory(args: &Args, config: &Config) -> Result<()> {
    let sizes = [args.batch_size, args.seq_len, config.vocab_size()];
    let numbers = sizes.into_iter().try_fold(2usize, |product, size| product.checked_mul(size));
    ensure!(
        numbers.is_some_and(|numbers| Vec::<f32>::new().try_reserve_exact(numbers).is_ok()),
        "there is not enough memory for the logits of --batch-size {} times --seq-len {}, {} for each token",
        args.batch_size,
        args.seq_len,
        config.vocab_size()
    );
    Ok(())
}

fn add(sum: (Tensor, Vec<Tensor>), part: (Tensor, Vec<Tensor>)) -> Result<(Tensor, Vec<Tensor>)> {
    let pairs = sum.1.into_iter().zip(part.1).collect();
    let grads = each(sum.0.device(), pairs, |(a, b): (Tensor, Tensor)| a + b)?;
    Ok(((sum.0 + part.0)?, grads))
}
