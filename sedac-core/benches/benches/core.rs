//! `cargo bench --manifest-path sedac-core/benches/Cargo.toml`; `python -m sedac_core.bench core` takes the figures from
//! benches/target/criterion.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use sedac_core::accumulator::{Outcome, Rule, evaluate};
use sedac_core::sweep::{Grid, sweep};
use sedac_core::threshold::{Controller, Published};

/// Risks between 0 and 2.5, the same every time.
fn risks(tokens: usize) -> Array2<f32> {
    Array2::from_shape_fn((3, tokens), |(i, token)| ((token * 7919 + i * 104_729) % 10_007) as f32 / 4_000.0)
}

fn accumulator(c: &mut Criterion) {
    let mut group = c.benchmark_group("evaluate");
    for tokens in [1, 8, 256, 65_536, 4_000_000] {
        let risks = risks(tokens);
        let rule = Rule::new(vec![0.3, 0.7, 1.1], vec![1.0; 3], 0.5, 0.5).unwrap();
        let (mut exits, mut confidence) = (vec![0; tokens], vec![0.0; tokens]);
        group.throughput(Throughput::Bytes(20 * tokens as u64)); // 12 read and 8 written a token
        group.bench_function(tokens.to_string(), |b| {
            b.iter(|| {
                let outcome = Outcome { exit_checkpoint: &mut exits, confidence: &mut confidence, width: &mut [] };
                evaluate(&rule, black_box(risks.view()), outcome)
            });
        });
    }
}

fn settings(c: &mut Criterion) {
    let risks = risks(65_536);
    let rows = Array2::from_shape_fn((1000, 3), |(row, i)| (1 + row / [1, 10, 100][i] % 10) as f32 / 5.0);
    let grid = Grid::new(rows.view(), vec![1.0; 3], vec![0.0, 0.5], vec![0.4, 0.5]).unwrap();
    let mut group = c.benchmark_group("sweep");
    group.sample_size(10).throughput(Throughput::Elements(65_536 * 4_000));
    group.bench_function("4000 settings of 65536 tokens", |b| b.iter(|| sweep(&grid, risks.view(), Some(risks.view()))));
}

fn thresholds(c: &mut Criterion) {
    let published = Published::new(&[1.0; 3]);
    let read = || {
        let mut set = [0.0; 3];
        published.load(&mut set);
        set
    };
    c.bench_function("read", |b| b.iter(read));
    // One writer that stores a set every 10 µs, ten times as often as any server steps; and one that never rests.
    for (name, pause) in [("read while written every 10 us", Duration::from_micros(10)), ("read while always written", Duration::ZERO)] {
        let writing = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut next = std::time::Instant::now();
                while writing.load(Ordering::Relaxed) {
                    published.store(black_box(&[1.0, 2.0, 3.0]));
                    next += pause;
                    while std::time::Instant::now() < next {
                        std::hint::spin_loop();
                    }
                }
            });
            c.bench_function(name, |b| b.iter(read));
            writing.store(false, Ordering::Relaxed);
        });
    }
    for tokens in [8, 512] {
        let batch: Vec<f32> = risks(tokens).row(0).to_vec();
        let mut controller = Controller::new(&[0.2, 0.6, 0.9], 0.2, 8192, &[1.0; 3]).unwrap();
        c.bench_function(&format!("controller step of {tokens}"), |b| {
            b.iter_batched(
                || batch.clone(),
                |batch| {
                    for i in 0..3 {
                        controller.observe(i, batch.iter().copied()).unwrap();
                    }
                    controller.update();
                },
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
    targets = accumulator, settings, thresholds
}
criterion_main!(benches);
