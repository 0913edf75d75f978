//! `cargo bench --manifest-path sedac-core/benches/Cargo.toml`; `python -m sedac_core.bench core` takes the figures from
//! benches/target/criterion.

use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
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
    group
        .bench_function("4000 settings of 65536 tokens", |b| b.iter(|| sweep(&grid, risks.view(), Some(risks.view()))));
}

fn thresholds(c: &mut Criterion) {
    let published = Published::new(&[1.0; 3]);
    let read = || {
        let mut set = [0.0; 3];
        published.load(&mut set);
        set
    };
    let timed = |reads| {
        let start = Instant::now();
        (0..reads).for_each(|_| _ = black_box(read()));
        start.elapsed()
    };
    let mut group = c.benchmark_group("threshold read");
    group.measurement_time(Duration::from_millis(200)); // short samples, beside which the writer runs from end to end
    group.sampling_mode(SamplingMode::Flat); // samples of one length: those thrown away below then tilt no regression
    group.bench_function("alone", |b| b.iter_custom(timed));
    // One writer that stores a set every 10 µs, ten times as often as any server steps; and one that never rests.
    for (name, pause, rest) in [("while written every 10 us", 10_000, true), ("while always written", 100, false)] {
        let (writing, stores) = (AtomicBool::new(true), AtomicU64::new(0));
        let pause = Duration::from_nanos(pause);
        let times = (Cell::new(Duration::ZERO), Cell::new(0)); // how long was read, how often written
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut next = Instant::now();
                while writing.load(Ordering::Relaxed) {
                    published.store(black_box(&[1.0, 2.0, 3.0]));
                    stores.fetch_add(1, Ordering::Relaxed);
                    next += pause;
                    while rest && Instant::now() < next {
                        std::hint::spin_loop();
                    }
                }
            });
            // A sample counts only if the writer really ran beside it, on a core of its own.
            let sample = |reads| {
                let before = stores.load(Ordering::Relaxed);
                let took = timed(reads);
                let written = stores.load(Ordering::Relaxed) - before;
                times.0.set(times.0.get() + took);
                times.1.set(times.1.get() + written);
                (took < 4 * pause || written as f64 > 0.25 * took.div_duration_f64(pause)).then_some(took)
            };
            group.bench_function(name, |b| {
                b.iter_custom(|reads| {
                    let until = Instant::now() + Duration::from_secs(10);
                    std::iter::repeat_with(|| sample(reads))
                        .find_map(|took| match took {
                            None if Instant::now() > until => {
                                writing.store(false, Ordering::Relaxed); // or the scope waits for it for ever
                                panic!("no core is left to the writer: measure when nothing else runs");
                            }
                            took => took,
                        })
                        .expect("it repeats")
                });
            });
            writing.store(false, Ordering::Relaxed);
            eprintln!(
                "a set was written every {:.0} ns",
                times.0.get().div_duration_f64(Duration::from_nanos(times.1.get()))
            );
        });
    }
    group.finish();
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
