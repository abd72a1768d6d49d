//! The operators against their definition.
//!
//! [`reference`] is the recurrence written out token by token in f64, forward and backward. Everything else is measured
//! against it, or against the golden cases in `tests/data/ops`, by relative RMS error.

mod case;
mod compare;
mod files;
mod layout;
mod reference;
mod run;

mod golden;
mod reference_checks;

mod bad_input;
mod delta;
mod dtypes;
mod edges;
mod graph;
mod huge;
mod layouts;
mod modes;
mod nested;
mod normalize;
mod properties;
mod sequences;
