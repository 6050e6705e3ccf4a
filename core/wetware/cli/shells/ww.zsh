#compdef ww
# ww completion for zsh
_ww_completion() {
    local -a plain described response
    local value help
    response=("${(@f)$(COMP_WORDS="${(F)words}" COMP_CWORD=$((CURRENT-1)) \
        _WW_COMPLETE=complete_zsh ww 2>/dev/null)}")
    for value help in "${response[@]}"; do
        if [[ -z $value ]]; then
            continue
        elif [[ $help == _ ]]; then
            plain+=("$value")
        else
            described+=("${value//:/\\:}:$help")
        fi
    done
    if (( $#described )); then
        _describe -V unsorted described -U
    fi
    if (( $#plain )); then
        compadd -U -V unsorted -a plain
    fi
    if (( ! $#described && ! $#plain )); then
        _files
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _ww_completion "$@"
else
    compdef _ww_completion ww
fi
