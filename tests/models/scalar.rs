//! Activations of one number, by the two tables of names.

pub fn fla_activation(name: &str, x: f64) -> f64 {
    match name {
        "gelu" => gelu_tanh(x),
        "sqrelu" => x.max(0.).powi(2),
        "logsigmoid" => -(-x).exp().ln_1p(),
        "relu" | "sigmoid" | "silu" | "swish" => transformers_activation(name, x),
        _ => panic!("activation {name}"),
    }
}

pub fn transformers_activation(name: &str, x: f64) -> f64 {
    match name {
        "relu" => x.max(0.),
        "relu2" => x.max(0.).powi(2),
        "sigmoid" => sigmoid(x),
        "silu" | "swish" => silu(x),
        "tanh" => x.tanh(),
        "linear" => x,
        "mish" => x * x.exp().ln_1p().tanh(),
        "quick_gelu" => x * sigmoid(1.702 * x),
        "gelu" | "gelu_python" => x * 0.5 * (1. + erf(x / 2f64.sqrt())),
        _ if name.starts_with("gelu") => gelu_tanh(x),
        _ => panic!("activation {name}"),
    }
}

fn gelu_tanh(x: f64) -> f64 {
    x * 0.5 * (1. + ((2. / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// By its series, which converges fast enough for the arguments here.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2. / std::f64::consts::PI.sqrt()
}

pub fn sigmoid(x: f64) -> f64 {
    1. / (1. + (-x).exp())
}

pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}
