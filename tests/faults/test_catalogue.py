"""The faults that services of this kind meet in the field, each with the tests that hold it.

A test in this folder is named after its fault; the others stand with the module they are about.
"""

import re
from pathlib import Path

FAULTS = {
    # the connection
    "A1": "a notification is read by a statement of our own",
    "A2": "a burst of notifications",
    "A3": "the backend is terminated while we sleep",
    "A4": "errors that mean a lost connection, and errors that do not",
    "A5": "the database starts, stops, recovers or refuses",
    "A6": "half-open TCP: nothing arrives any more",
    "A7": "a frozen server or a stalled proxy, while the kernel still acknowledges",
    "A8": "told to stop while inside the database driver",
    "A9": "we vanish, and the server keeps what we held",
    "A10": "names are looked up slowly",
    "A11": "a transaction pooler: LISTEN hears nothing, settings leak",
    "A12": "a standby, a failover",
    "A13": "a burst over TLS",
    "A14": "another client encoding",
    "A15": "fork after connect",
    "A16": "a transaction that stays open",
    "A17": "notified while disconnected",
    "A18": "secrets in errors",
    "A19": "timeouts of the role or the database end our session",
    "A20": "a failover forgets a claim whose call was accepted",
    "A21": "a claim that takes long to commit uses up the call's time",
    "A22": "a column of jobs changes its type under open sessions",
    "A23": "DB_PORT=tcp://…, as Kubernetes sets it",
    "A24": "the database's clock is set back",
    "A25": "a primary that is frozen, and answers when another has taken its place",
    "A26": "the old primary still answers after a failover",
    "A27": "no connection is left",
    # NOTIFY
    "B1": "a payload of 8,000 bytes and more",
    "B2": "the notification queue is pinned and fills",
    "B3": "a listener that does not read",
    "B4": "NOTIFY takes a lock across all databases at commit",
    "B5": "equal notifications are folded, a rollback is silent",
    "B6": "other channels, other databases, two-phase commit",
    "B7": "LISTEN itself fails",
    # the database trigger
    "C1": "the application's role has no grants on our tables",
    "C2": "names of ours are shadowed by the caller's",
    "C3": "an empty search_path, a restore",
    "C4": "our tables are gone, the trigger is not",
    "C5": "changes that no trigger sees",
    "C6": "a data-only restore, a clone",
    "C7": "a partitioned table, BEFORE triggers, deleted jobs",
    "C8": "updates that change nothing, NULL, endless error texts",
    "C9": "row-level security hides jobs",
    "C10": "ids of any type, malformed payloads",
    "C11": "an id that is unique only with the tenant",
    "C12": "the id column gets another type or name, or is dropped",
    "C13": "the columns of the state get another type",
    "C14": "jobs is renamed, moved, or made a partition",
    "C15": "ids with a collation of their own",
    "C16": "default privileges grant our tables to others",
    "C17": "who installs does not own jobs",
    "C18": "two installs at once",
    "C19": "values of jobs that cannot be converted",
    "C20": "rows of a megabyte",
    "C21": "times without their zone, or in the future",
    "C22": "an id that is too long for an index of ours",
    "C23": "objects of the application with our names",
    # claims
    "D1": "the session of a claim is lost during its call",
    "D2": "a call that outlasts its lease",
    "D3": "a transaction held open during a call",
    "D4": "a late result overwrites another's",
    "D5": "the connection dies in COMMIT",
    "D6": "rows that others hold are passed by",
    "D7": "a call is committed late",
    "D8": "an old snapshot elsewhere keeps dead rows",
    "D9": "every idle listener wakes for every notification",
    # HTTP
    "H1": "an answer that drips",
    "H2": "an answer that is cut",
    "H3": "an answer without end, a gzip bomb",
    "H4": "what an exception says about the request",
    "H5": "a kept-alive connection that the server has closed",
    "H6": "a kept-alive connection into a black hole",
    "H7": "a .netrc",
    "H8": "proxy and CA variables",
    "H9": "redirects",
    "H10": "odd values of Retry-After",
    "H11": "a job id in a URL",
    "H12": "hostile text of a tenant",
    "H13": "odd answers, no file descriptors left",
    "H14": "409 while the first request runs",
    "H15": "503 for one job alone",
    "H16": "one wrong answer to all jobs",
    "H17": "interim answers",
    "H18": "answers to a probe that no POST would survive",
    "H19": "an error page that shows our headers",
    "H20": "letters escaped in JSON",
    "H21": "a stage function returns the answer of its own request",
    # the process
    "P1": "the first process of a container",
    "P2": "a signal that ends no wait",
    "P3": "a signal between the answer and the write",
    "P4": "stopped or killed during a call",
    "P5": "a full disk under the heartbeat",
    "P6": "a long call looks like a hang",
    "P7": "the clock steps",
    "P8": "overlapping checks, reused pids",
    "P9": "nobody reads the output",
    "P10": "memory grows with notifications",
    "P11": "an accepted call waits to be recorded while the next one computes",
    "P12": "a stage function ends its process",
    "P13": "a stage function forks, sets alarms, starts threads",
    "P14": "thousands of attempts",
    "P15": "an alert command that does not end",
    "P16": "SIGHUP",
    "P17": "nothing can be written",
    "P18": "the heartbeat is removed",
    "P19": "orphans of process 1",
    "P20": "ids that begin with a dash",
    "P21": "dollars and quotes in .env",
    "P22": "a system that is not Linux",
    "P23": "two installations in one database",
    "P24": "notifications that anybody sends",
    "P25": "ids that cannot be compared or hashed",
}
ELSEWHERE = {
    "A1": [
        "test_listener::test_notification_read_with_the_answer_to_a_statement_is_not_slept_over"
    ],
    "A2": [
        "test_listener::test_burst_of_notifications_is_heard_to_its_end",
        "test_listener::test_hear_takes_every_notification_and_keeps_none",
    ],
    "A5": [
        "test_listener::test_database_down_at_start_is_waited_for_and_logged_once",
        "test_pipeline::test_database_restart_loses_nothing_and_repeats_nothing",
        "test_ops_check::test_listener_without_its_database_is_alive",
    ],
    "A17": [
        "test_listener::test_listens_before_the_first_look_for_due_calls",
        "test_pipeline::test_jobs_that_finished_while_no_listener_ran_are_called",
    ],
    "A19": ["test_session_settings::test_session_has_our_limits_whatever_was_set_for_it"],
    "A20": ["test_turns::test_call_that_a_new_primary_forgot_is_not_repeated"],
    "A21": ["test_orphans::test_stage_has_its_whole_timeout_however_long_the_claim_took"],
    "A22": ["test_ddl::test_session_that_first_wrote_while_a_column_was_another_writes_on"],
    "A23": ["test_config::test_port_that_kubernetes_sets_is_passed_over_with_a_line"],
    "A24": ["test_upkeep::test_sweep_that_finds_a_call_before_its_time_has_all_of_them_found"],
    "A25": ["test_hosts::test_idle_listener_leaves_a_server_that_is_frozen_for_another"],
    "A26": ["test_hosts::test_old_primary_that_still_answers_is_named"],
    "A27": ["test_pipeline::test_last_connections_are_said_at_the_start"],
    "B1": [
        "test_schema_values::test_payload_comes_without_what_made_it_long",
        "test_schema_values::test_everything_long_at_once_does_not_abort",
        "test_schema_values::test_text_id_of_2400_bytes_is_owed",
    ],
    "B4": ["test_silent::test_silent_trigger_writes_the_debt_and_notifies_nothing"],
    "B5": [
        "test_schema::test_there_and_back_in_one_transaction_is_a_new_arrival",
        "test_schema::test_rolled_back_change_leaves_nothing",
        "test_listener::test_sweep_finds_a_call_whose_notification_was_lost",
    ],
    "C1": ["test_schema_security::test_application_role_needs_no_grant_on_our_tables"],
    "C2": [
        "test_schema_security::test_temporary_tables_of_the_caller_are_not_used",
        "test_schema_security::test_shadowing_functions_do_not_run_in_the_trigger",
    ],
    "C3": [
        "test_schema::test_session_with_an_empty_search_path_is_served",
        "test_schema_install::test_dumped_and_restored_database_goes_on",
    ],
    "C4": ["test_schema_security::test_missing_tables_let_the_application_through_with_a_warning"],
    "C7": [
        "test_schema_values::test_job_that_moves_between_partitions_owes_its_call",
        "test_schema::test_change_made_by_a_before_trigger_counts",
        "test_trigger_moves::test_deleted_job_is_skipped",
    ],
    "C8": [
        "test_schema::test_same_state_again_changes_nothing",
        "test_schema::test_null_is_a_state_like_any_other",
        "test_calls_settle::test_error_of_any_length_is_cut",
        "test_trigger_log::test_long_error_is_cut",
    ],
    "C9": ["test_schema_security::test_hidden_jobs_are_an_error_and_not_deleted_ones"],
    "C10": [
        "test_schema_values::test_job_id_of_any_type_is_owed_and_claimed",
        "test_listener::test_malformed_notifications_are_logged_and_skipped",
    ],
    "C11": ["test_schema_names::test_id_that_is_not_unique_by_itself_is_refused"],
    "C12": [
        "test_ddl::test_next_write_goes_through_and_the_change_is_named",
        "test_ddl::test_install_keeps_all_that_is_owed",
    ],
    "C13": ["test_ddl::test_install_keeps_all_that_is_owed"],
    "C14": ["test_ddl::test_install_keeps_all_that_is_owed"],
    "C15": ["test_schema_names::test_copies_have_the_collation_of_the_id"],
    "C16": ["test_schema_names::test_default_privileges_give_nobody_a_right"],
    "C17": ["test_schema_names::test_role_that_only_has_trigger_does_not_lend_its_rights"],
    "C18": ["test_upgrade::test_second_install_waits_for_the_first"],
    "C19": [
        "test_ops_backfill::test_columns_that_are_not_needed_are_not_read",
        "test_ops_jobs::test_columns_that_are_not_needed_are_not_read",
    ],
    "C20": ["test_ops_backfill::test_rows_of_a_megabyte_are_not_read"],
    "C21": ["test_ops_backfill::test_only_a_time_with_its_zone_in_the_past_is_trusted"],
    "C22": [
        "test_schema_values::test_id_that_is_too_long_for_an_index_of_ours_is_let_through_with_a_warning"
    ],
    "C23": ["test_schema_names::test_names_of_the_application_are_refused_and_never_replaced"],
    "D2": [
        "test_calls::test_call_is_taken_over_once_its_lease_has_run_out",
        "test_stage_transaction::test_open_transaction_keeps_other_listeners_away_after_the_lease",
    ],
    "D3": ["test_pipeline::test_application_is_not_blocked_during_a_call"],
    "D4": [
        "test_calls_settle::test_listener_that_comes_back_late_leaves_the_call_alone",
        "test_trigger_retries::test_late_result_leaves_the_call_alone_once_the_lease_was_taken_over",
    ],
    "H1": [
        "test_stage_http_limits::test_call_whose_answer_comes_drop_by_drop_ends_at_its_deadline"
    ],
    "H2": ["test_stage_http::test_answer_that_may_have_been_cut_is_not_known"],
    "H3": [
        "test_stage_http_limits::test_long_answer_is_dropped_and_not_known",
        "test_stage_http_limits::test_gzip_bomb_is_not_decoded",
    ],
    "H4": [
        "test_stage_http::test_refused_connection_is_not_sent",
        "test_stage_http::test_unknown_host_is_not_sent",
        "test_stage_http::test_connection_that_ends_before_the_answer_is_broken",
        "test_stage_http_tls::test_handshake_with_a_plain_port_is_not_sent",
        "test_stage_http_tls::test_tls_that_breaks_after_the_request_is_not_known",
    ],
    "H5": [
        "test_stage_http_limits::test_connection_idle_for_more_than_two_seconds_is_not_reused",
        "test_stage_http_limits::test_post_on_a_connection_that_died_is_not_sent_again",
    ],
    "H7": ["test_stages::test_netrc_and_proxy_variables_are_ignored"],
    "H8": [
        "test_stages::test_netrc_and_proxy_variables_are_ignored",
        "test_stage_http_tls::test_environment_cannot_make_a_certificate_trusted",
    ],
    "H9": ["test_stage_http::test_redirect_is_not_followed"],
    "H10": ["test_stage_http::test_retry_after_is_safely_read_and_clamped"],
    "H12": [
        "test_stages::test_hostile_text_arrives_intact_in_the_body_and_in_no_header",
        "test_logs::test_data_cannot_begin_a_line_of_its_own",
        "test_trigger_log::test_answer_cannot_forge_a_line",
    ],
    "H13": ["test_trigger_retries::test_worker_that_runs_out_of_file_descriptors_lives_on"],
    "H14": [
        "test_trigger::test_unknown_outcome_is_due_again_only_after_the_lease",
        "test_trigger_functions::test_response_of_its_own_request_counts_as_that_of_post",
    ],
    "H15": ["test_health::test_job_that_is_put_off_while_others_are_accepted_spends_attempts"],
    "H16": ["test_health::test_wrong_answer_to_several_jobs_is_about_the_stage"],
    "H17": ["test_stage_http::test_complete_answer_is_accepted"],
    "H18": ["test_ops_verify::test_answer_that_no_post_would_survive_is_a_problem"],
    "H19": ["test_echoes::test_headers_that_a_stage_shows_are_shown_to_nobody"],
    "H20": ["test_ops_jobs::test_letters_that_json_escaped_can_be_read"],
    "H21": ["test_trigger_functions::test_response_of_its_own_request_counts_as_that_of_post"],
    "P2": ["test_stop::test_signal_ends_an_idle_listener_and_its_workers"],
    "P3": ["test_stop::test_claim_that_arrives_together_with_the_signal_is_called_and_waited_for"],
    "P4": [
        "test_stop::test_signal_lets_the_call_finish_and_starts_no_other",
        "test_deploying::test_compose_grace_period_is_longer_than_a_call",
        "test_orphans::test_answers_that_come_after_the_listener_was_killed_are_recorded",
        "test_orphans::test_answers_that_the_killed_listener_had_not_read_are_recorded",
        "test_pipeline::test_killed_host_is_followed_by_the_same_calls_after_their_leases",
    ],
    "P5": ["test_heartbeat::test_full_disk_is_no_reason_to_stop"],
    "P6": [
        "test_heartbeat::test_long_call_is_not_a_hang",
        "test_heartbeat::test_stopped_listener_is_noticed_soon_though_its_worker_is_in_a_long_call",
    ],
    "P7": ["test_heartbeat::test_heartbeat_of_another_boot_is_dead"],
    "P8": ["test_heartbeat::test_freed_lock_means_dead_although_the_pid_lives"],
    "P11": ["test_turns::test_accepted_call_is_on_record_while_the_next_stage_function_computes"],
    "P12": ["test_workers::test_call_that_ends_its_worker_is_one_unknown_call"],
    "P13": ["test_workers::test_call_that_meddles_with_its_process_succeeds_and_so_does_the_next"],
    "P14": ["test_trigger_retries::test_stage_may_be_tried_thousands_of_times"],
    "P15": [
        "test_alerts::test_command_that_hangs_delays_no_call_and_no_call_delays_its_next_try",
        "test_alerts::test_alert_whose_command_outlasts_a_stop_is_logged",
    ],
    "P16": ["test_stop::test_signal_lets_the_call_finish_and_starts_no_other"],
    "P17": ["test_config_files::test_heartbeats_are_kept_where_something_can_be_written"],
    "P18": ["test_heartbeat::test_listener_whose_heartbeat_was_removed_is_alive"],
    "P19": ["test_reaping::test_listener_that_is_process_1_has_no_zombies"],
    "P20": ["test_ops_tables::test_id_may_begin_with_a_dash"],
    "P21": [
        "test_config_files::test_dollar_in_a_password_is_what_the_file_says",
        "test_config::test_quotes_that_docker_keeps_are_named",
    ],
    "P22": ["test_systems::test_system_that_lacks_what_we_need_gets_one_line"],
    "P23": ["test_ops_status::test_listener_of_another_schema_is_not_ours"],
    "P24": ["test_notifications::test_more_than_an_allowance_are_counted_and_not_logged"],
    "P25": ["test_schema_names::test_type_that_cannot_be_an_id_is_refused"],
}
HERE = Path(__file__).parent


def names(folder: Path) -> set[str]:
    """Every test in a folder, as file::test."""
    return {
        f"{file.stem}::{test}"
        for file in folder.glob("test_*.py")
        for test in re.findall(r"(?m)^def (test_\w+)", file.read_text())
        if file != Path(__file__)
    }


def faults(name: str) -> list[str]:
    """Which faults a test of this folder is named after."""
    return re.match(r"\w+::test_((?:[a-z]\d+_)+)", name)[1].upper().split("_")[:-1]


def test_every_fault_is_held_by_a_test():
    held = {fault for name in names(HERE) for fault in faults(name)} | ELSEWHERE.keys()
    assert held == FAULTS.keys()


def test_tests_that_stand_elsewhere_are_there():
    assert {name for tests in ELSEWHERE.values() for name in tests} <= names(HERE.parent)
