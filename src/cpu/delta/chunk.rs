pub(super) fn run(sweep: &super::sweep::DeltaSweep, state: &mut [f32]) {
    super::recurrent::run(sweep, state);
}
