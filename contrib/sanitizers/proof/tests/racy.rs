//! Races that must be reported, one a test.

use std::sync::Arc;
use std::thread;

use proof::Word;

fn racy_adds(word: &Word) {
    for _ in 0..100 {
        word.add_one();
    }
}

#[test]
fn by_spawn() {
    let word = Arc::new(Word::default());
    let other = word.clone();
    let adds = thread::spawn(move || racy_adds(&other));
    racy_adds(&word);
    adds.join().unwrap();
}

#[test]
fn by_scope() {
    let word = Word::default();
    thread::scope(|scope| {
        scope.spawn(|| racy_adds(&word));
        scope.spawn(|| racy_adds(&word));
    });
}
