//! Functions of many tensors with many results in Candle's graph.
//!
//! A Candle custom op has at most three tracked arguments and exactly one result. A [`Function`] with more is put in the
//! graph as a chain of small ops that share one record of the call:
//!
//! ```text
//! input 0 ─ link ─┐
//! input 1 ─────── link ─┐                ┌─ result 0
//! input 2 ───────────── link ─ … ─ token ┤
//!                                        └─ result 1
//! ```
//!
//! What flows along the chain is a token of one element for each result: Candle zero-fills and adds up every gradient it
//! is handed, so the small token makes that cheap. The tensors themselves pass through the record: going back, each
//! result leaves its gradient there and gets a ticket for it, which is its element of the token's gradient. The end of
//! the chain, which Candle visits after all results, has the tickets of just those that its own backward pass has been
//! to; it computes the gradients of all inputs and leaves them for another ticket, with which each link fetches its own.
//! So passes over one graph may run at the same time, or within one another, or end halfway with an error.
//!
//! On a GPU reading a ticket would mean waiting for everything that is queued there. There a pass is told by its thread,
//! and what a failed one left by this, that Candle no longer holds the token's gradient (see [`Mark`]); passes may not run
//! within one another.

mod slot;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, bail,
};

use slot::{Slot, cpu, cuda, metal};

/// A differentiable function.
pub(crate) trait Function: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// The results. The inputs carry no graph.
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>>;

    /// The gradient of each input that is `wanted`, given those of the results that have one.
    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// Calls `f` and links its results to those inputs that are tracked. With none tracked nothing is kept.
pub(crate) fn apply(f: impl Function, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let readable = inputs.iter().all(|x| x.device().is_cpu());
    apply_with(f, inputs, readable)
}

fn apply_with(f: impl Function, inputs: &[Tensor], readable: bool) -> Result<Vec<Tensor>> {
    let saved: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
    let wanted: Vec<bool> = inputs.iter().map(Tensor::track_op).collect();
    let mut results = f.forward(&saved)?;
    if !wanted.contains(&true) {
        let plain = |(storage, shape)| Tensor::from_storage(storage, shape, BackpropOp::none(), false);
        return Ok(results.into_iter().map(plain).collect());
    }
    if results.len() == 1
        && !inputs.iter().skip(3).any(Tensor::track_op)
        && let Some([a, b, c]) = three(inputs)
        && let Some(result) = results.pop()
    {
        return Ok(vec![a.apply_op3(b, c, Single { f, saved, wanted, result: Slot::new(result) })?]);
    }
    let results_len = results.len();
    let call =
        Arc::new(Call { f, saved, wanted, results: results_len, readable, deposits: Mutex::default() });
    let tracked: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    let mut chain: Option<Tensor> = None;
    for &input in &tracked {
        let link = Link { call: call.clone(), input, last: tracked.last() == Some(&input) };
        chain = Some(match chain {
            None => inputs[input].apply_op1(link)?,
            Some(token) => token.apply_op2(&inputs[input], link)?,
        });
    }
    let Some(token) = chain else { bail!("{}: no tracked input to link to", call.f.name()) };
    let leave = |(at, result)| token.apply_op1(Leave { call: call.clone(), at, result: Slot::new(result) });
    let results = results.into_iter().enumerate().map(leave).collect::<Result<Vec<_>>>()?;
    Ok(results)
}

/// The first three of some tensors, or the last in the place of those that are missing: it gets no gradient for these.
fn three(inputs: &[Tensor]) -> Option<[&Tensor; 3]> {
    let last = inputs.last()?;
    Some([0, 1, 2].map(|i| inputs.get(i).unwrap_or(last)))
}

/// A new token for `results` results.
fn token<S>(like: &S, results: usize) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(results);
    Ok((like.device().zeros_impl(&shape, DType::F32)?, shape))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panicking thread leaves behind here is whole: every change is a single insertion or removal.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The whole function as one op, for up to three tracked inputs and one result.
struct Single<F> {
    f: F,
    saved: Vec<Tensor>,
    wanted: Vec<bool>,
    result: Slot,
}

impl<F: Function> CustomOp3 for Single<F> {
    fn name(&self) -> &'static str {
        self.f.name()
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout)
        -> Result<(CpuStorage, Shape)> {
        self.result.take(self.name(), cpu)
    }

    #[rustfmt::skip]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout)
        -> Result<(CudaStorage, Shape)> {
        self.result.take(self.name(), cuda)
    }

    #[rustfmt::skip]
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout)
        -> Result<(MetalStorage, Shape)> {
        self.result.take(self.name(), metal)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grads = [Some(grad.detach())];
        let mut grads = self.f.backward(&self.saved, &grads, &self.wanted)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}

/// One call of a function with more inputs or results than an op can have.
struct Call<F> {
    f: F,
    saved: Vec<Tensor>,
    wanted: Vec<bool>,
    /// How many results there are.
    results: usize,
    /// Whether the value of a token can be read at no cost.
    readable: bool,
    deposits: Mutex<Deposits>,
}

/// Gradients on their way, by ticket. What a pass that fails does not fetch stays, and goes with the graph.
#[derive(Default)]
struct Deposits {
    issued: Ticket,
    of_results: HashMap<Ticket, Tensor>,
    of_inputs: HashMap<Ticket, HashMap<usize, Tensor>>,
    /// Tickets that no token has.
    marked: Vec<Marked>,
}

/// A ticket, who has it, and for which element of the token's gradient it stands.
struct Marked {
    thread: ThreadId,
    alive: Weak<()>,
    at: usize,
    ticket: Ticket,
}

/// From 1 on; 0 is no ticket.
type Ticket = u32;

/// Tokens are f32, which has every whole number up to here.
const MOST_TICKETS: Ticket = 1 << f32::MANTISSA_DIGITS;

impl Deposits {
    fn issue(&mut self) -> Result<Ticket> {
        if self.issued == MOST_TICKETS {
            bail!("one graph has had more than {MOST_TICKETS} backward passes: build it anew");
        }
        self.issued += 1;
        Ok(self.issued)
    }
}

impl<F: Function> Call<F> {
    /// Keeps the gradient of result `at`. Returns the gradient of the token.
    fn leave(&self, at: usize, grad: Tensor, token: &Tensor) -> Result<Tensor> {
        let ticket = {
            let mut deposits = lock(&self.deposits);
            let ticket = deposits.issue()?;
            deposits.of_results.insert(ticket, grad);
            ticket
        };
        self.hand_on(at, ticket, token)
    }

    /// The gradient of `token` that has one ticket, in element `at`.
    fn hand_on(&self, at: usize, ticket: Ticket, token: &Tensor) -> Result<Tensor> {
        if !self.readable {
            return self.mark(at, ticket, token);
        }
        let tickets = (0..self.results).map(|i| if i == at { ticket as f32 } else { 0. });
        Tensor::from_vec(tickets.collect(), token.shape(), token.device())
    }

    fn mark(&self, at: usize, ticket: Ticket, token: &Tensor) -> Result<Tensor> {
        let thread = std::thread::current().id();
        let alive = Arc::new(());
        {
            let marked = &mut lock(&self.deposits).marked;
            marked.retain(|m| m.alive.strong_count() > 0);
            if marked.iter().any(|m| (m.thread, m.at) == (thread, at)) {
                bail!(
                    "{}: on a GPU a backward pass cannot run within another one of its graph",
                    self.f.name()
                );
            }
            marked.push(Marked { thread, alive: Arc::downgrade(&alive), at, ticket });
        }
        token.apply_op1(Mark { name: self.f.name(), _alive: alive })
    }

    /// The tickets that the gradient of a token has.
    fn tickets(&self, grad: &Tensor) -> Result<Vec<Ticket>> {
        if self.readable {
            return Ok(grad.to_vec1::<f32>()?.into_iter().map(|x| x as Ticket).collect());
        }
        let (mut tickets, me) = (vec![0; self.results], std::thread::current().id());
        let marked = &mut lock(&self.deposits).marked;
        for mine in marked.extract_if(.., |m| m.thread == me) {
            tickets[mine.at] = mine.ticket;
        }
        Ok(tickets)
    }

    /// Computes the gradients of all inputs from those of the results that `tickets` are for.
    fn backward(&self, tickets: &[Ticket]) -> Result<Ticket> {
        let fetch = |ticket: &Ticket| match lock(&self.deposits).of_results.remove(ticket) {
            None if *ticket > 0 => bail!("{}: the gradient of a result was fetched twice", self.f.name()),
            grad => Ok(grad),
        };
        let grads = tickets.iter().map(fetch).collect::<Result<Vec<_>>>()?;
        let grads = self.f.backward(&self.saved, &grads, &self.wanted)?;
        let grads = grads.into_iter().enumerate().filter_map(|(i, grad)| Some((i, grad?))).collect();
        let mut deposits = lock(&self.deposits);
        let ticket = deposits.issue()?;
        deposits.of_inputs.insert(ticket, grads);
        Ok(ticket)
    }

    /// The gradient of one input.
    fn fetch(&self, ticket: Ticket, input: usize) -> Result<Tensor> {
        let mut deposits = lock(&self.deposits);
        let grads = deposits.of_inputs.get_mut(&ticket);
        let grad = grads.and_then(|grads| grads.remove(&input));
        if deposits.of_inputs.get(&ticket).is_some_and(HashMap::is_empty) {
            deposits.of_inputs.remove(&ticket);
        }
        match grad {
            Some(grad) => Ok(grad),
            None => bail!("{}: no gradient was computed for input {input}", self.f.name()),
        }
    }
}

/// Puts one tracked input on the chain.
struct Link<F> {
    call: Arc<Call<F>>,
    input: usize,
    last: bool,
}

impl<F: Function> Link<F> {
    /// The gradient of the input, and the ticket for those of the inputs before it on the chain.
    fn gradient(&self, token: &Tensor) -> Result<(Tensor, Ticket)> {
        let tickets = self.call.tickets(token)?;
        let ticket = if self.last { self.call.backward(&tickets)? } else { tickets[0] };
        Ok((self.call.fetch(ticket, self.input)?, ticket))
    }
}

impl<F: Function> CustomOp1 for Link<F> {
    fn name(&self) -> &'static str {
        self.call.f.name()
    }

    fn cpu_fwd(&self, x: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token(x, self.call.results)
    }

    fn cuda_fwd(&self, x: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        token(x, self.call.results)
    }

    fn metal_fwd(&self, x: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        token(x, self.call.results)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, token: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient(token)?.0))
    }
}

impl<F: Function> CustomOp2 for Link<F> {
    fn name(&self) -> &'static str {
        self.call.f.name()
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, x: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token(x, self.call.results)
    }

    #[rustfmt::skip]
    fn cuda_fwd(&self, x: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        token(x, self.call.results)
    }

    #[rustfmt::skip]
    fn metal_fwd(&self, x: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        token(x, self.call.results)
    }

    #[rustfmt::skip]
    fn bwd(&self, chain: &Tensor, _: &Tensor, _: &Tensor, token: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad, ticket) = self.gradient(token)?;
        Ok((Some(self.call.hand_on(0, ticket, chain)?), Some(grad)))
    }
}

/// Takes one result off the end of the chain.
struct Leave<F> {
    call: Arc<Call<F>>,
    at: usize,
    result: Slot,
}

impl<F: Function> CustomOp1 for Leave<F> {
    fn name(&self) -> &'static str {
        self.call.f.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result.take(self.name(), cpu)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.result.take(self.name(), cuda)
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.result.take(self.name(), metal)
    }

    fn bwd(&self, chain: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.call.leave(self.at, grad.detach(), chain).map(Some)
    }
}

/// The gradient of a token, where no ticket can be read from it. Candle sums it up with those of other results, and the
/// sum of what is differentiable keeps its op: it is there until the chain's next link takes the sum, or the pass fails.
struct Mark {
    name: &'static str,
    _alive: Arc<()>,
}

impl CustomOp1 for Mark {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        token(x, layout.shape().elem_count())
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        token(x, layout.shape().elem_count())
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        token(x, layout.shape().elem_count())
    }
}

#[cfg(test)]
mod tests;
