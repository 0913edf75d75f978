//! Risk control: which settings keep a loss under a bound, with confidence.
//!
//! Learn then Test (Angelopoulos et al., arXiv 2110.01052), as CALM uses it for early exits (Schuster et al., arXiv
//! 2207.07061): for each setting the hypothesis "its mean loss is over the tolerated one" gets a valid p-value, here
//! Hoeffding–Bentkus, and multiple testing keeps the chance of any false certificate at most δ.

use crate::error::Error;

/// P-values for the hypothesis that the mean loss is over `tolerated`, given an empirical `mean` of `samples`
/// independent losses in [0, 1]: the smaller of Hoeffding's bound and Bentkus' bound.
#[must_use]
pub fn p_value(mean: f64, samples: u64, tolerated: f64) -> f64 {
    if mean >= tolerated {
        return 1.0; // where both bounds have passed 1
    }
    let n = samples as f64;
    let hoeffding = (-n * divergence(mean, tolerated)).exp();
    let bentkus = std::f64::consts::E * binomial_cdf((n * mean).ceil(), n, tolerated);
    hoeffding.min(bentkus).min(1.0)
}

/// Which settings are certified, and all p-values: `means` holds chains of `length` settings each, tested in order from
/// the most careful on at confidence δ / chains until one fails. Chains of length 1 are Bonferroni's correction, one
/// chain is fixed-sequence testing.
///
/// # Errors
/// [`Error::Value`] for a mean outside [0, 1], no samples, or a tolerated loss or δ not between 0 and 1.
pub fn certify(
    means: &[f64],
    length: usize,
    samples: u64,
    tolerated: f64,
    delta: f64,
) -> Result<(Vec<bool>, Vec<f64>), Error> {
    let unit = |what, found, inside: bool| {
        if inside { Ok(()) } else { Err(Error::Value { what, found, expected: "between 0 and 1" }) }
    };
    for &mean in means {
        unit("mean loss", mean, (0.0..=1.0).contains(&mean))?;
    }
    unit("tolerated loss", tolerated, tolerated > 0.0 && tolerated < 1.0)?;
    unit("delta", delta, delta > 0.0 && delta < 1.0)?;
    if samples == 0 {
        return Err(Error::Value { what: "samples", found: 0.0, expected: "at least one" });
    }
    let p_values: Vec<f64> = means.iter().map(|&mean| p_value(mean, samples, tolerated)).collect();
    let chains = means.len().checked_div(length).unwrap_or(0);
    let mut certified = Vec::with_capacity(means.len());
    for chain in p_values.chunks(length.max(1)) {
        let passed = chain.iter().take_while(|&&p| p <= delta / chains as f64).count();
        certified.extend((0..chain.len()).map(|i| i < passed));
    }
    Ok((certified, p_values))
}

/// Kullback–Leibler divergence of two coins.
fn divergence(a: f64, b: f64) -> f64 {
    let part = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a * (a / b).ln() };
    part(a, b) + part(1.0 - a, 1.0 - b)
}

/// P(X ≤ k) for X binomial(n, p): the terms from k downwards, each from the one before, until they no longer count.
fn binomial_cdf(k: f64, n: f64, p: f64) -> f64 {
    if k >= n {
        return 1.0;
    }
    let choose = libm::lgamma(n + 1.0) - libm::lgamma(k + 1.0) - libm::lgamma(n - k + 1.0);
    let largest = choose + k * p.ln() + (n - k) * (-p).ln_1p();
    let (mut term, mut sum, mut j) = (1.0_f64, 0.0_f64, k); // relative to the term of k
    let mode = (n + 1.0) * p;
    loop {
        sum += term;
        if j == 0.0 || (j < mode && term < 1e-17 * sum) {
            return (largest + sum.ln()).exp().min(1.0);
        }
        term *= j * (1.0 - p) / ((n - j + 1.0) * p);
        j -= 1.0;
    }
}
