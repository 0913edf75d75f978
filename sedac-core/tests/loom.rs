//! The publication under loom's model checker, which tries every interleaving and every value a load may see:
//! RUSTFLAGS="--cfg loom" cargo test --release --test loom
#![cfg(loom)]

use sedac_core::threshold::Published;

#[test]
fn a_reader_sees_one_whole_set_and_never_goes_back() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let published = loom::sync::Arc::new(Published::new(&[0.0; 2]));
        let writer = loom::sync::Arc::clone(&published);
        let writer = loom::thread::spawn(move || (1..=2_u8).for_each(|n| writer.store(&[f32::from(n); 2])));
        let (mut set, mut before) = ([9.0; 2], 0.0);
        for _ in 0..2 {
            published.load(&mut set);
            assert!(set[0] == set[1] && set[0] >= before, "{set:?} after {before}");
            before = set[0];
        }
        writer.join().unwrap();
    });
}

#[test]
fn of_two_writers_one_whole_set_stays() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let published = loom::sync::Arc::new(Published::new(&[0.0; 2]));
        let writer = loom::sync::Arc::clone(&published);
        let writer = loom::thread::spawn(move || writer.store(&[1.0; 2]));
        published.store(&[2.0; 2]);
        writer.join().unwrap();
        let mut set = [9.0; 2];
        published.load(&mut set);
        assert!(set == [1.0; 2] || set == [2.0; 2], "{set:?}");
    });
}
