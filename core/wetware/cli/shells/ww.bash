# ww completion for bash
_ww_completion() {
    local value command=${1/#\~/$HOME}
    COMPREPLY=()
    while IFS= read -r value; do
        [[ -n $value ]] && COMPREPLY+=("${value%%$'\t'*}")
    done < <(IFS=$'\n'; COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \
        _WW_COMPLETE=complete_words "$command" 2>/dev/null)
}
complete -o bashdefault -o default -F _ww_completion ww
